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
    assert measure_gap(TRAINER, SAMPLER, MASK, ALONE) == LogpGap(mean=0.5, max=1.0)


def measure(world):
    return measure_gap(TRAINER * (world.rank + 1), SAMPLER * (world.rank + 1), MASK, world)


def test_over_all_ranks(ranks):
    assert ranks(measure) == [LogpGap(mean=0.75, max=2.0)] * 2


def test_a_large_gap_stops_the_run():
    refuse_large_gap(LogpGap(0.5, 9.0), 0.5, step=3)
    for mean in (0.51, math.nan, math.inf):
        with pytest.raises(UserError, match=r"^step 3: .*rollout\.max_gap 0\.5.*") as caught:
            refuse_large_gap(LogpGap(mean, 9.0), 0.5, step=3)
        assert "\n" not in str(caught.value)
