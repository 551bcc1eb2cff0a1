"""Metrics of a step, against hand-worked numbers."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mssr.algorithms.advantages import Outcomes
from mssr.batch import GradedRollouts, Prompt
from mssr.distributed import ALONE
from mssr.observe.step import SlowGrading, outcome_metrics, sampled_token_entropy, step_metrics
from mssr.policy.engine import UpdateStats
from mssr.rollout.gap import LogpGap


def prompt(tokens):
    return Prompt("key", 0, "", "", None, torch.zeros(tokens, dtype=torch.int64), None, None, ())


def test_means_over_responses_tokens_and_updates():
    """Prompts of 10 and 6 tokens, responses of 3 and 1; the shorter response is truncated and wrong."""
    batch = GradedRollouts(
        prompts=(prompt(10), prompt(6)),
        tokens=torch.zeros(2, 3, dtype=torch.int64),
        mask=torch.tensor([[True, True, True], [True, False, False]]),
        logp=torch.tensor([[0.5, 0.5, 1.0], [0.25, 0.1, 0.1]]).log(),  # the padding does not count
        truncated=torch.tensor([False, True]),
        weight_version=torch.zeros(2, dtype=torch.int64),
        masked=torch.tensor([False, False]),
        texts=("", ""),
        parts=({}, {}),
        graded=torch.tensor([True, True]),
        reward=torch.tensor([1.0, 0.5]),
        correct=torch.tensor([1.0, 0.0]),
    )
    updates = [
        UpdateStats({"entropy": value}, torch.zeros(1, 3), grad_norm=norm, lr=lr)
        for value, norm, lr in [(2, 1, 3), (4, 5, 7)]
    ]
    clock = SimpleNamespace(seconds={"generate": 1.5}, memory={"memory/generate_rss_gib": 2.0}, total=4.0)
    found = step_metrics(batch, updates, LogpGap(0.1, 0.2, 0.3), clock, ALONE)
    assert found == pytest.approx({
        "train/reward": 0.75, "train/correct": 0.5, "train/grad_norm": 3, "train/lr": 7,
        "rollout/response_tokens": 2, "rollout/truncated": 0.5,
        "rollout/logp_gap_mean": 0.1, "rollout/logp_gap_p99": 0.2, "rollout/logp_gap_max": 0.3,
        "policy/entropy": 3, "policy/entropy_proxy": (0.34657 + 0.34657 + 0 + 0.34657) / 4,
        "perf/generate_seconds": 1.5, "perf/step_seconds": 4, "perf/tokens_per_second": (16 + 4) / 4,
        "memory/generate_rss_gib": 2,
    }, rel=1e-4)  # fmt: skip
    first = replace(batch, graded=torch.tensor([True, False]))
    found = step_metrics(first, updates, LogpGap(0.1, 0.2, 0.3), clock, ALONE)
    assert (found["train/reward"], found["train/correct"], found["rollout/truncated"]) == (1.0, 1.0, 0.5)
    none = replace(batch, graded=torch.tensor([False, False]))
    assert math.isnan(step_metrics(none, updates, LogpGap(0.1, 0.2, 0.3), clock, ALONE)["train/reward"])


def outcomes_of(reward, *, success=None, value=None, group=1, graded=None, success_weight=1.0):
    reward, count = torch.tensor(reward), len(reward)
    graded = torch.ones(count, dtype=torch.bool) if graded is None else torch.tensor(graded)
    success = reward if success is None else torch.tensor(success)
    value = None if value is None else torch.tensor(value)
    return Outcomes(reward, success, graded, value, torch.ones(count), group, success_weight)


def test_groups_whose_responses_all_earned_the_same():
    outcomes = outcomes_of([1.0, 1, 0, 1, 0, 0, 1, 0], group=2)
    assert outcome_metrics(outcomes) == {"rollout/zero_variance": 0.5}


def test_baselines_and_what_they_foretold():
    found = outcome_metrics(outcomes_of([1.0, 0.0], value=[0.5, 0.2]))
    assert found["tracker/baseline_mean"] == pytest.approx(0.35)
    assert found["tracker/brier"] == pytest.approx((0.25 + 0.04) / 2)


def test_the_tracker_foretells_the_success_of_graded_responses():
    outcomes = outcomes_of(
        [2.5, -0.5, 0.0], success=[1.0, 0.0, 0.0], value=[0.5, 0.2, 0.9], graded=[True, True, False], success_weight=2.0
    )
    found = outcome_metrics(outcomes)
    assert found["tracker/baseline_mean"] == pytest.approx(2 * (0.5 + 0.2 + 0.9) / 3)
    assert found["tracker/brier"] == pytest.approx((0.25 + 0.04) / 2)
    assert [count for count, *_ in found["tracker/bins"]] == [0, 0, 1, 0, 0, 1, 0, 0, 0, 0]


def test_sampled_token_entropy_by_hand():
    # p = 1/2: log(2)/2 = 0.34657; p = 1/e: 1/e, the most there is; p = 1 and p = 0: 0
    logp = torch.tensor([math.log(0.5), -1.0, 0.0, -math.inf])
    expected = torch.tensor([0.346574, 0.367879, 0.0, 0.0])
    torch.testing.assert_close(sampled_token_entropy(logp), expected, atol=1e-6, rtol=0)


def test_sampled_token_entropy_is_at_most_one_over_e():
    assert sampled_token_entropy(torch.linspace(-200, 0, 10_001)).max().item() <= math.exp(-1) + 1e-7


def test_slow_grading_is_said_once():
    quick = {"perf/generate_seconds": 9.0, "perf/reward_seconds": 2.0, "perf/step_seconds": 12.0}
    watch = SlowGrading()
    assert (
        watch.warning(quick | {"perf/grading_seconds": 20.0}, "judge") is None
    )  # most of it was beside the generation
    for _ in range(2):
        assert watch.warning(quick | {"perf/reward_seconds": 10.0}, "judge") is None  # started a worker
        assert watch.warning(quick | {"perf/reward_seconds": 0.0, "perf/generate_seconds": 0.0}, "judge") is None
    assert watch.warning(quick | {"perf/reward_seconds": 10.0}, "judge") is None
    assert watch.warning(quick | {"perf/reward_seconds": 10.0}, "judge").startswith(
        "grading was the slowest phase (10 s after generation), most of it in the reward function judge: more reward.workers"
    )
    assert watch.warning(quick | {"perf/reward_seconds": 10.0}, "judge") is None
