"""The stream of rows: shuffled epochs, no end, no state."""

from collections import Counter
from itertools import chain
from math import ceil

import pytest

from mssr.data.sampler import PromptSampler


@pytest.mark.parametrize(("size", "per_step"), [(10, 4), (12, 4), (7, 7), (5, 12), (1, 3), (100, 1)])
def test_epochs_are_complete_permutations(size, per_step):
    sampler = PromptSampler(size, per_step, seed=3)
    steps = [sampler.rows(step) for step in range(5 * size)]
    assert all(len(rows) == per_step for rows in steps)
    stream = list(chain(*steps))
    epochs = [stream[start : start + size] for start in range(0, len(stream), size)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)  # 5 * per_step whole epochs
    assert max(max(Counter(rows).values()) for rows in steps) <= ceil(per_step / size) + 1


def test_epochs_differ_and_are_shuffled():
    sampler = PromptSampler(1000, 1000, seed=0)
    first, second = sampler.rows(0), sampler.rows(1)
    assert first != second != sorted(second)
    assert first != sorted(first)


def test_rows_depend_on_seed_and_step_only():
    forward = PromptSampler(10, 4, seed=1)
    wanted = [forward.rows(step) for step in range(20)]
    for step in (19, 0, 7, 3, 12):
        assert PromptSampler(10, 4, seed=1).rows(step) == wanted[step] == forward.rows(step)
    assert [PromptSampler(10, 4, seed=2).rows(step) for step in range(20)] != wanted
    assert [PromptSampler(10, 4, seed=-1).rows(step) for step in range(20)] != wanted
