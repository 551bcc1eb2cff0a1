"""The rollout/trainer log-prob gap."""

import math

import pytest
import torch
from policy_helpers import ALONE

from mssr.errors import UserError
from mssr.policy.engine import UpdateStats
from mssr.rollout.gap import LogpGap, measure_gap
from mssr.training.skipping import SkippedSteps

MASK = torch.tensor([[True, True, False], [True, False, False]])
TRAINER = torch.tensor([[-1.0, -2.0, 7.0], [-3.0, 0.0, 0.0]])
SAMPLER = torch.tensor([[-1.5, -2.0, 0.0], [-2.0, 9.0, 0.0]])


def test_mean_and_largest_of_the_sampled_tokens():
    assert measure_gap(TRAINER, SAMPLER, MASK, ALONE) == LogpGap(mean=0.5, p99=1.0, max=1.0)


def test_the_99th_percentile_is_of_tokens():
    """Of 1,000 tokens, the ten largest gaps are above it."""
    gaps = torch.arange(1000.0).flip(0).view(4, 250)
    found = measure_gap(gaps, torch.zeros(4, 250), torch.ones(4, 250).bool(), ALONE)
    assert found == LogpGap(mean=499.5, p99=989.0, max=999.0)


def test_a_gap_that_is_no_number_is_none_of_the_three():
    found = measure_gap(TRAINER.clone().fill_(math.nan), SAMPLER, MASK, ALONE)
    assert math.isnan(found.mean) and math.isnan(found.p99) and math.isnan(found.max)


def test_without_a_token_there_is_no_gap():
    assert measure_gap(TRAINER, SAMPLER, torch.zeros_like(MASK), ALONE) == LogpGap(0.0, 0.0, 0.0)


def test_what_top_p_explains_is_no_gap():
    """The sampler's tokens have 0.5 to 1 of the probability: the trainer's log-probs are smaller by at most log 2."""
    sampler = torch.tensor([[-1.0, -1.0, -1.0, -1.0]])
    trainer = sampler + torch.tensor([[0.0, -0.6, -math.log(2) - 0.3, 0.1]])
    assert measure_gap(trainer, sampler, torch.ones(1, 4).bool(), ALONE, top_p=0.5).mean == pytest.approx(0.4 / 4)
    assert math.isnan(measure_gap(trainer * math.nan, sampler, torch.ones(1, 4).bool(), ALONE, top_p=0.5).mean)


def measure(world):
    return measure_gap(TRAINER * (world.rank + 1), SAMPLER * (world.rank + 1), MASK, world)


def test_over_all_ranks(ranks):
    assert ranks(measure) == [LogpGap(mean=0.75, p99=2.0, max=2.0)] * 2


def gap_of(offset):
    """Return the gap of log-probs that differ from the sampler's by `offset`."""
    return measure_gap(SAMPLER + offset, SAMPLER, MASK, ALONE)


def test_a_large_gap_is_not_within_the_limit():
    assert gap_of(0.5).within(0.5) and gap_of(-0.5).within(0.5)
    for offset in (0.51, math.nan, math.inf):
        assert not gap_of(offset).within(0.5)


def update(applied):
    return UpdateStats({}, torch.zeros(1, 1), grad_norm=1.0, lr=1e-3, applied=applied)


def test_steps_left_out_are_counted_and_too_many_in_a_row_end_the_run():
    skipped, good, bad = SkippedSteps(2, max_gap=0.5), gap_of(0.0), gap_of(2.0)
    for number in (1, 2):
        reason = skipped.observe(bad, [update(False)])
        assert "disagree by 2 nats" in reason and "rollout.max_gap 0.5" in reason and "\n" not in reason
        skipped.refuse_to_go_on(number, bad, reason)
    assert skipped.observe(good, [update(True), update(True)]) is None
    for number in (4, 5):
        reason = skipped.observe(good, [update(True), update(False)])
        assert "1 of 2 updates skipped: gradients are not finite" in reason
        skipped.refuse_to_go_on(number, good, reason)
    assert skipped.metrics() == {"train/skipped_steps": 4}
    resumed = SkippedSteps(2, max_gap=0.5)
    resumed.load_state_dict(skipped.state_dict())
    reason = resumed.observe(good, [update(False)])
    with pytest.raises(UserError, match="^step 6: 1 of 1 updates.*after 2 skipped steps"):
        resumed.refuse_to_go_on(6, good, reason)


def test_broken_weights_end_the_run_at_once():
    skipped, gap = SkippedSteps(5, max_gap=0.5), gap_of(math.nan)
    with pytest.raises(UserError, match="step 1: .* log-probs became NaN.*--resume.*weight sync"):
        skipped.refuse_to_go_on(1, gap, skipped.observe(gap, [update(False)]))
