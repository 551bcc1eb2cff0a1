"""Replacing rows of a batch."""

import torch

from mssr.batch import GradedRollouts, Prompt


def batch(lengths, name, reward=0):
    longest = max(lengths)
    rows = len(lengths)
    prompts = [Prompt(f"{name}{row}", row, "", "", None, torch.zeros(1), None, None, ()) for row in range(rows)]
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    start = 100 * (name == "new")
    tokens = (start + torch.arange(rows * longest).view(rows, longest)) * mask
    whole = torch.full((rows,), reward)
    return GradedRollouts(
        tuple(prompts),
        tokens,
        mask,
        logp=-tokens.float(),
        truncated=torch.zeros(rows, dtype=torch.bool),
        weight_version=whole,
        reward=whole.float(),
        correct=whole.float(),
        graded=torch.ones(rows, dtype=torch.bool),
        masked=torch.zeros(rows, dtype=torch.bool),
        parts=tuple({name: float(row)} for row in range(rows)),
        texts=tuple(f"{name} text {row}" for row in range(rows)),
    )


def test_rows_take_the_place_of_others_whatever_their_length():
    old, new = batch([2, 3, 1], "old"), batch([5, 1], "new", reward=1)
    merged = old.with_rows([2, 0], new)
    assert merged.keys == ["new1", "old1", "new0"]
    assert merged.lengths.tolist() == [1, 3, 5]
    assert [merged.response(row).tolist() for row in range(3)] == [[105], [3, 4, 5], [100, 101, 102, 103, 104]]
    assert merged.reward.tolist() == [1, 0, 1]
    assert merged.logp.shape == merged.tokens.shape == merged.mask.shape == (3, 5)
    assert merged.texts == ("new text 1", "old text 1", "new text 0")
    assert merged.parts == ({"new": 1}, {"old": 1}, {"new": 0})
    assert old.lengths.tolist() == [2, 3, 1]


def test_shorter_rows_in_a_longer_batch():
    merged = batch([4, 4], "old").with_rows([1], batch([2], "new"))
    assert merged.lengths.tolist() == [4, 2]
    assert merged.response(1).tolist() == [100, 101]
