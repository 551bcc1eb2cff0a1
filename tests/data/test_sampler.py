"""Rows of each step: endless shuffled epochs without state, or draws weighted by the value tracker."""

from collections import Counter
from fractions import Fraction
from itertools import chain, islice, pairwise, permutations
from math import ceil, floor

import pytest
import torch
from scipy.stats import chisquare

from mssr.algorithms.prompt_sampling import PrioritisedSampler
from mssr.algorithms.value_tracker import ValueTracker
from mssr.config.algorithm_keys import TrackerConfig
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


def test_the_stream_is_the_one_that_runs_were_made_with():
    sampler = PromptSampler(10, 4, seed=0)
    assert [sampler.rows(step) for step in range(3)] == [[1, 0, 2, 4], [9, 3, 8, 6], [7, 5, 1, 4]]


# Weights


def epochs_of(parts, count, seed=0):
    """Return how often each row is in each of the first epochs."""
    size = sum(rows for rows, _ in parts)
    ends = [sum(floor(epoch * Fraction(str(w)) * n) for n, w in parts) for epoch in range(count + 1)]
    lengths = [end - start for start, end in pairwise(ends)]
    sampler = PromptSampler(size, 1, seed, parts)
    stream = iter([sampler.rows(step)[0] for step in range(sum(lengths))])
    return [Counter(islice(stream, length)) for length in lengths]


def test_weights_of_one_change_nothing():
    plain, parts = PromptSampler(30, 7, 4), PromptSampler(30, 7, 4, [(10, 1.0), (20, 1.0)])
    assert [plain.rows(step) for step in range(30)] == [parts.rows(step) for step in range(30)]


def test_a_weight_is_a_share_of_the_epochs():
    epochs = epochs_of([(6, 2.0), (4, 0.5), (5, 1.0)], 6)
    for first, second in zip(epochs[::2], epochs[1::2]):
        for epoch in (first, second):
            assert [epoch[row] for row in range(6)] == [2] * 6 and [epoch[row] for row in range(10, 15)] == [1] * 5
        halves = [{row for row in range(6, 10) if epoch[row]} for epoch in (first, second)]
        assert [len(half) for half in halves] == [2, 2] and halves[0] | halves[1] == set(range(6, 10))


@pytest.mark.parametrize("weight", [0.1, 0.3, 0.7, 1.5, 2.25, 1e-3])
def test_every_row_of_a_source_is_drawn_equally_often(weight):
    drawn = Counter()
    for epoch in epochs_of([(7, weight), (3, 1.0)], 400):
        drawn += epoch
    assert [drawn[row] for row in (7, 8, 9)] == [400] * 3
    assert all(abs(drawn[row] - 400 * weight) <= 1 for row in range(7))


def test_weighted_rows_depend_on_seed_and_step_only():
    parts = [(11, 0.3), (9, 1.7)]
    wanted = [PromptSampler(20, 6, 1, parts).rows(step) for step in range(40)]
    again = PromptSampler(20, 6, 1, parts)
    assert [again.rows(step) for step in (39, 0, 17)] == [wanted[step] for step in (39, 0, 17)]
    assert [PromptSampler(20, 6, 2, parts).rows(step) for step in range(40)] != wanted


# Prioritised sampling


def tracker_of(values: list[float]) -> ValueTracker:
    """Return a tracker with the given values (multiples of 1/20) of the prompts "0", "1", ..."""
    tracker = ValueTracker(TrackerConfig(preset="reference"))
    keys = [str(row) for row in range(len(values)) for _ in range(20)]
    tracker.initialise(keys, torch.tensor([float(place < 20 * value) for value in values for place in range(20)]))
    return tracker


def prioritised(values: list[float], per_step: int, seed: int = 0) -> PrioritisedSampler:
    return PrioritisedSampler([str(row) for row in range(len(values))], tracker_of(values), per_step, seed)


VALUES = [0.0, 0.1, 0.5, 0.8, 1.0]
WEIGHTS = [0.05, 0.35, 0.55, 0.45, 0.05]  # sqrt(0.1 * 0.9) = 0.3, sqrt(0.25) = 0.5, sqrt(0.8 * 0.2) = 0.4


def chances_of_pairs(weights: list[float]) -> dict[frozenset, float]:
    """Return the probability of each pair of rows, drawn one after the other without replacement."""
    total = sum(weights)
    chances = Counter()
    for first, second in permutations(range(len(weights)), 2):
        chances[frozenset((first, second))] += weights[first] / total * weights[second] / (total - weights[first])
    return chances


def test_rows_are_drawn_by_the_uncertainty_of_their_value():
    steps = 6000
    sampler = prioritised(VALUES, 2)
    seen = Counter(frozenset(sampler.rows(step)) for step in range(steps))
    chances = chances_of_pairs(WEIGHTS)
    assert set(seen) <= set(chances)
    pairs = list(chances)
    assert chisquare([seen[pair] for pair in pairs], [steps * chances[pair] for pair in pairs]).pvalue > 0.01


def test_a_sources_weight_multiplies_the_rows_own():
    keys = [str(row) for row in range(5)]
    steps = 4000
    sampler = PrioritisedSampler(keys, tracker_of(VALUES), 1, 0, [(2, 1.0), (3, 2.0)])
    drawn = Counter(sampler.rows(step)[0] for step in range(steps))
    weights = [weight * (1 + (row > 1)) for row, weight in enumerate(WEIGHTS)]
    expected = [steps * weight / sum(weights) for weight in weights]
    assert chisquare([drawn[row] for row in range(5)], expected).pvalue > 0.01


def test_the_order_within_a_step_says_nothing_about_weight():
    steps = 4000
    sampler = prioritised(VALUES, 2)
    first = Counter(sampler.rows(step)[0] for step in range(steps))
    chances = chances_of_pairs(WEIGHTS)
    expected = [steps / 2 * sum(chance for pair, chance in chances.items() if row in pair) for row in range(5)]
    assert chisquare([first[row] for row in range(5)], expected).pvalue > 0.01


def test_draws_follow_the_tracker():
    tracker = tracker_of([0.5] * 400)
    sampler = PrioritisedSampler([str(row) for row in range(400)], tracker, 100, seed=0)
    assert sum(row < 200 for row in sampler.rows(7)) > 25
    settled = [str(row) for row in range(200)]
    tracker.initialise(settled, torch.ones(200))
    # 200 rows of weight 0.05 and 200 of 0.55: at first about one draw in twelve is of the former
    assert sum(row < 200 for row in sampler.rows(7)) < 25


def test_a_step_of_a_large_set():
    rows = prioritised([0.5, 0.0] * 2000, 1024).rows(0)
    assert len(rows) == len(set(rows)) == 1024
    assert all(isinstance(row, int) for row in rows)


def test_prioritised_rows_of_a_set_smaller_than_a_step_are_whole_passes_and_a_rest():
    rows = prioritised(VALUES, 12).rows(0)
    assert sorted(rows[:5]) == sorted(rows[5:10]) == list(range(5))
    assert len(rows) == 12 and len(set(rows[10:])) == 2


def test_prioritised_rows_depend_on_seed_step_and_tracker_only():
    values = [(row % 21) / 20 for row in range(100)]
    wanted = [prioritised(values, 10).rows(step) for step in range(10)]
    again = prioritised(values, 10)
    assert [again.rows(step) for step in (9, 0, 4)] == [wanted[step] for step in (9, 0, 4)]
    assert [prioritised(values, 10, seed=-1).rows(step) for step in range(10)] != wanted
    assert len({tuple(rows) for rows in wanted}) == 10


def test_a_saved_tracker_draws_the_same():
    tracker = tracker_of([0.2, 0.5, 0.9] * 20)
    loaded = ValueTracker(TrackerConfig(preset="reference"))
    loaded.load_state_dict(tracker.state_dict())
    keys = [str(row) for row in range(60)]
    draws = [PrioritisedSampler(keys, each, 20, seed=3).rows(5) for each in (tracker, loaded)]
    assert draws[0] == draws[1]


# Replacement rows


def sampler(size: int, seed: int = 0) -> PromptSampler:
    return PromptSampler(size, 8, seed)


def test_a_refill_repeats_nothing_while_there_are_others():
    rows = sampler(40).rows(3)
    first = sampler(40).refill(3, rows, 5, 0)
    second = sampler(40).refill(3, {*rows, *first}, 27, 1)
    assert sorted(rows + first + second) == list(range(40))


def test_a_refill_beyond_the_set_takes_the_others_first():
    refill = sampler(10).refill(0, range(7), 16, 0)
    assert sorted(refill[:3]) == [7, 8, 9]
    assert sorted(refill[3:13]) == list(range(10))
    assert len(set(refill[13:])) == 3
    assert sorted(sampler(4).refill(0, range(4), 4, 0)) == [0, 1, 2, 3]
    assert sampler(4).refill(0, range(4), 0, 0) == []


def test_a_refill_depends_on_seed_step_and_round_only():
    wanted = sampler(1000).refill(2, [1, 5, 9], 20, 1)
    used = sampler(1000)
    for step in range(4):
        used.rows(step)
    assert used.refill(2, {9, 5, 1}, 20, 1) == wanted
    for other in ((3, 1, 0), (2, 2, 0), (2, 1, 1)):
        step, round, seed = other
        assert sampler(1000, seed).refill(step, [1, 5, 9], 20, round) != wanted


def test_uniform_refills_are_uniform():
    sampler = PromptSampler(12, 4, seed=0)
    drawn = Counter(chain(*(sampler.refill(step, [0, 1, 2, 3], 2, 0) for step in range(4000))))
    assert set(drawn) == set(range(4, 12))
    assert chisquare([drawn[row] for row in range(4, 12)]).pvalue > 0.01
