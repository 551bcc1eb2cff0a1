"""The rollout/trainer log-prob gap."""

import math

import pytest
import torch
from policy_helpers import ALONE

from mssr.errors import UserError
from mssr.rollout.gap import LogpGap, measure_gap, refuse_large_gap

MASK = torch.tensor([[True, True, False], [True, False, False]])
TRAINER = torch.tensor([[-1.0, -2.0, 7.0], [-3.0, 0.0, 0.0]])
SAMPLER = torch.tensor([[-1.5, -2.0, 0.0], [-2.0, 9.0, 0.0]])


def test_mean_and_largest_of_the_sampled_tokens():
    assert measure_gap(TRAINER, SAMPLER, MASK, ALONE) == LogpGap(mean=0.5, p99=1.0, max=1.0)


def test_the_99th_percentile_is_of_tokens():
    """Of 1,000 tokens the ten largest gaps are beyond it."""
    gaps = torch.arange(1000.0).flip(0).view(4, 250)
    found = measure_gap(gaps, torch.zeros(4, 250), torch.ones(4, 250).bool(), ALONE)
    assert found == LogpGap(mean=499.5, p99=989.0, max=999.0)


def test_a_gap_that_is_no_number_is_none_of_the_three():
    found = measure_gap(TRAINER.clone().fill_(math.nan), SAMPLER, MASK, ALONE)
    assert math.isnan(found.mean) and math.isnan(found.p99) and math.isnan(found.max)


def test_without_a_token_there_is_no_gap():
    assert measure_gap(TRAINER, SAMPLER, torch.zeros_like(MASK), ALONE) == LogpGap(0.0, 0.0, 0.0)


def measure(world):
    return measure_gap(TRAINER * (world.rank + 1), SAMPLER * (world.rank + 1), MASK, world)


def test_over_all_ranks(ranks):
    assert ranks(measure) == [LogpGap(mean=0.75, p99=2.0, max=2.0)] * 2


def test_a_large_gap_stops_the_run():
    refuse_large_gap(LogpGap(0.5, 2.0, 9.0), 0.5, step=3)
    for mean in (0.51, math.nan, math.inf):
        with pytest.raises(UserError, match=r"^step 3: .*rollout\.max_gap 0\.5.*") as caught:
            refuse_large_gap(LogpGap(mean, 2.0, 9.0), 0.5, step=3)
        assert "\n" not in str(caught.value)
