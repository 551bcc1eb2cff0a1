"""Epochs without solved prompts."""

from collections import Counter

import pytest
import torch

from mssr.data.sampler import PromptSampler
from mssr.data.solved import MIN_VISITS, UnsolvedSampler


class FakeTracker(dict):
    """Values by key; 0.5 for others."""

    def values(self, keys):
        return torch.tensor([self.get(key, 0.5) for key in keys], dtype=torch.float32)


def sampler_of(tracker, size=20, per_step=4, seed=0, parts=()):
    return UnsolvedSampler([str(row) for row in range(size)], tracker, 0.9, per_step, seed, parts)


def run(sampler, steps, *, first=0):
    """Take steps as a run does: one epoch ahead is decided, then the step's prompts are seen."""
    taken = []
    for step in range(first, steps):
        sampler.decide(step + 1)
        taken.append(sampler.rows(step))
        sampler.observe(str(row) for row in taken[-1])
    return taken


def visited(sampler, *rows):
    sampler.observe(str(row) for row in rows for _ in range(MIN_VISITS))


def test_without_solved_prompts_the_order_is_the_usual_one():
    tracker = FakeTracker()
    assert run(sampler_of(tracker), 30) == [PromptSampler(20, 4, 0).rows(step) for step in range(30)]


def test_solved_prompts_are_not_drawn_in_the_epochs_that_follow():
    tracker = FakeTracker({"3": 0.9, "7": 0.95, "8": 0.89})
    sampler = sampler_of(tracker)
    visited(sampler, 3, 7, 8)
    before = [sampler.decide(1), *run(sampler, 5)]
    assert sorted(sampler.solved) == [3, 7] and before[0] == 2
    tracker["0"] = 1.0
    visited(sampler, 0)
    after = run(sampler, 9, first=5)
    epoch = [row for rows in before[1:] + after for row in rows][:18]
    assert sorted(epoch) == sorted(set(range(20)) - {3, 7})  # row 0 was in this epoch already
    later = Counter(row for rows in run(sampler, 60, first=9)[3:] for row in rows)
    assert set(later) == set(range(20)) - {0, 3, 7}
    assert sampler.solved[0].epoch > sampler.solved[3].epoch == 0 and sampler.solved[0].value == 1.0


def test_few_visits_solve_nothing():
    sampler = sampler_of(FakeTracker({"3": 1.0}))
    sampler.observe(["3"] * (MIN_VISITS - 1))
    assert sampler.decide(0) == 0
    sampler.observe(["3"])
    assert sampler.decide(5) == 1  # the next epoch begins in step 5


def test_a_solved_prompt_stays_out():
    tracker = FakeTracker({"3": 1.0})
    sampler = sampler_of(tracker)
    visited(sampler, 3)
    sampler.decide(0)
    tracker["3"] = 0.1
    assert 3 not in {row for rows in run(sampler, 30) for row in rows}


def test_a_steps_worth_of_prompts_stays_those_of_the_lowest_values():
    tracker = FakeTracker({str(row): 0.9 + row / 1000 for row in range(20)})
    sampler = sampler_of(tracker)
    visited(sampler, *range(20))
    assert sampler.decide(0) == 16 and sampler.all_solved
    assert [sorted(rows) for rows in run(sampler, 5)] == [[0, 1, 2, 3]] * 5
    small = sampler_of(FakeTracker({str(row): 1.0 for row in range(3)}), size=3)
    visited(small, 0, 1, 2)
    assert small.decide(3) == 0 and small.all_solved and sorted(set(run(small, 4)[3])) == [0, 1, 2]


def test_a_resumed_run_draws_the_same_though_its_tracker_is_further():
    def solve(tracker, sampler, steps, first=0):
        taken = []
        for step in range(first, steps):
            taken += run(sampler, step + 1, first=step)
            tracker[str(step)] = 1.0
            visited(sampler, step)
        return taken

    tracker = FakeTracker()
    whole = solve(tracker, sampler_of(tracker), 18)
    for saved in range(1, 18):
        tracker = FakeTracker()
        sampler = sampler_of(tracker)
        solve(tracker, sampler, saved)
        sampler.decide(saved + 1)  # the end of a step, before its checkpoint
        resumed = sampler_of(tracker)
        resumed.load_state_dict(sampler.state_dict())
        resumed.rows(saved)
        assert solve(tracker, resumed, 18, first=saved) == whole[saved:]


def test_what_is_not_decided_is_not_drawn():
    with pytest.raises(RuntimeError, match="not decided"):
        sampler_of(FakeTracker()).rows(0)


def test_with_weights():
    tracker = FakeTracker({"0": 1.0, "10": 1.0})
    sampler = sampler_of(tracker, parts=[(10, 2.0), (10, 0.5)])
    visited(sampler, 0, 10)
    sampler.decide(100)
    epoch = Counter(row for step in range(100) for row in sampler.rows(step))
    assert set(epoch) == set(range(20)) - {0, 10}
    assert min(epoch[row] for row in range(1, 10)) > 3 * max(epoch[row] for row in range(11, 20))
