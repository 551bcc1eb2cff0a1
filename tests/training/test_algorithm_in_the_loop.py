"""The algorithm in the training loop: metrics of real steps equal values worked out by hand."""

import math
import statistics

import pytest
from run_folder import RunFolder

N0 = 8  # 1 / (1 - rho_min)
ONE_UPDATE = ("train.steps=2", "train.responses_per_update=16", "algorithm.kl_coef=0.1")


@pytest.fixture(scope="module")
def train(mssr, warm, tmp_path_factory):
    """Return a function that makes a short run with overrides."""

    def train(*overrides):
        run = RunFolder(tmp_path_factory.mktemp("short") / "run")
        mssr("train", warm, run.override, *overrides).check()
        return run

    return train


@pytest.fixture(scope="module")
def with_rollout_logp(train):
    return train(*ONE_UPDATE, "algorithm.old_logp=rollout")


def test_a_baseline_is_from_before_the_step_saw_the_reward(whole):
    """Steps 1 to 4 visit each of the 64 prompts once: before its visit nothing is known about a prompt."""
    baselines = [line["tracker/baseline_mean"] for line in whole.metrics[1:]]
    assert baselines[:4] == [0.25] * 4  # half of the expected success, as its weight says
    assert baselines[4] != 0.25 and baselines[5] != 0.25
    assert {rollout["baseline"] for rollout in whole.rollouts(4)} == {0.25}


def test_a_visit_moves_the_value_by_the_update_rule(whole):
    """From Beta(4, 4), with forgetting factor rho and success r: v = (4 rho + r) / (8 rho + 1)."""
    first = whole.metrics[1]
    rho = first["tracker/rho_mean"]
    assert rho == pytest.approx(min(max(2 ** (-first["tracker/drift_mean"] / 0.06), 0.875), 0.96))
    expected = (N0 / 2 * rho + first["train/correct"]) / (N0 * rho + 1)
    assert first["tracker/value_mean"] == pytest.approx(expected, rel=1e-6)


def test_the_second_visit_is_compared_with_the_first(whole):
    """Rows of step 5 were visited once, in steps 1 to 4; their baselines are the values after that visit."""
    seen = {
        rollout["row"]: (rollout["correct"], whole.metrics[step]["tracker/rho_mean"])
        for step in range(1, 5)
        for rollout in whole.rollouts(step)
    }
    assert sorted(seen) == list(range(64))
    for rollout in whole.rollouts(5):
        success, rho = seen[rollout["row"]]
        assert rollout["baseline"] == pytest.approx(0.5 * (N0 / 2 * rho + success) / (N0 * rho + 1), rel=1e-6)


@pytest.mark.parametrize("step", [1, 5])
def test_advantages_are_normalised_over_the_step(whole, step):
    rollouts = whole.rollouts(step)
    raw = [rollout["reward"] - rollout["baseline"] for rollout in rollouts]
    mean, std = statistics.fmean(raw), statistics.pstdev(raw)
    assert std > 0
    assert [rollout["advantage"] for rollout in rollouts] == pytest.approx([(a - mean) / std for a in raw], abs=1e-5)


def test_first_rollouts_set_the_baselines(whole_with_everything):
    """One first rollout per prompt, Jeffreys-smoothed: successes 0 and 1 give values 0.25 and 0.75; half counts."""
    baselines = [rollout["baseline"] for step in range(1, 5) for rollout in whole_with_everything.rollouts(step)]
    assert set(baselines) == {0.125, 0.375}


def test_drift_is_measured_on_each_prompts_previous_response(whole_with_everything):
    """At step 1 these were sampled from the initial policy, which has not moved yet, so the drift is 0."""
    drift = [line["tracker/drift_mean"] for line in whole_with_everything.metrics[1:]]
    assert drift[0] < 1e-4 < 1e-2 < min(drift[1:])
    rho = [line["tracker/rho_mean"] for line in whole_with_everything.metrics[1:]]
    assert rho[0] == pytest.approx(0.96) and max(rho[1:]) < 0.96


def test_mvsr_is_mssr_without_shaping(train, whole):
    mssr_first, mvsr_first = whole.metrics[1], train("algorithm.name=mvsr", "train.steps=1").metrics[1]
    assert mssr_first["policy/shaping"] > 0 and mvsr_first["policy/shaping"] == 0
    for key in ("train/reward", "tracker/baseline_mean", "rollout/response_tokens", "rollout/logp_gap_mean"):
        assert mvsr_first[key] == mssr_first[key]
    assert mvsr_first["train/grad_norm"] != mssr_first["train/grad_norm"]


def test_shaping_by_the_sampled_token_is_bounded(train, whole):
    shaping = train("algorithm.entropy_source=sampled_token", "train.steps=1").metrics[1]["policy/shaping"]
    assert 0 < shaping <= 0.4 / math.e
    assert shaping != whole.metrics[1]["policy/shaping"]


def test_the_kl_is_zero_until_the_first_update(with_rollout_logp):
    first, second = with_rollout_logp.metrics[1:]
    assert first["policy/kl"] == 0
    assert second["policy/kl"] > 0


def test_recomputed_log_probs_give_the_same_first_update(train, with_rollout_logp):
    recomputed = train(*ONE_UPDATE, "algorithm.old_logp=recompute").metrics[1]
    rollout = with_rollout_logp.metrics[1]
    assert recomputed["policy/ratio_max"] == 1  # exactly 1: scoring repeats the same computation
    assert recomputed["policy/tis_weight"] == pytest.approx(1, abs=1e-4)
    assert (
        rollout["policy/ratio_max"] == pytest.approx(1, abs=1e-4) and rollout["policy/ratio_max"] != 1
    )  # the sampler's log-probs
    assert recomputed["train/grad_norm"] == pytest.approx(rollout["train/grad_norm"], rel=1e-3)
    assert recomputed["policy/policy_loss"] == pytest.approx(rollout["policy/policy_loss"], rel=1e-3, abs=1e-4)
