"""Two ranks give what one rank gives at the same global batch, under every ZeRO stage."""

import numpy as np
import pytest

STEPS = 3


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_two_ranks_equal_one(mssr, warm, run, whole, stage):
    common = ["train", warm, run.override, f"train.zero_stage={stage}"]
    if stage == 1:  # in two parts: each rank's share of the optimiser comes back
        finish(mssr.ranks(2, *common, "train.steps=2"))
        common.append("--resume")
    finish(mssr.ranks(2, *common, f"train.steps={STEPS}"))
    assert [line["step"] for line in run.metrics] == list(range(STEPS + 1))
    for mine, theirs in zip(run.metrics, whole.metrics):
        for key, value in theirs.items():
            if not key.startswith("rollout/logp_gap"):  # rounding noise itself
                assert np.ravel(mine[key]) == pytest.approx(np.ravel(value), rel=1e-3, abs=1e-5), (mine["step"], key)
    # Rank 0 saved its own eight rows of step 1: the global batch's first four of each update.
    rollouts = whole.rollouts(1)
    expected = [rollouts[slot] for slot in (0, 1, 2, 3, 8, 9, 10, 11)]
    for mine, theirs in zip(run.rollouts(1), expected, strict=True):
        assert (mine["row"], mine["response"], mine["reward"]) == (theirs["row"], theirs["response"], theirs["reward"])
        assert mine["advantage"] == pytest.approx(theirs["advantage"], rel=1e-5)


def finish(ranks):
    for ended in ranks:
        ended.check()


def test_another_number_of_ranks_and_another_stage_go_on(mssr, warm, run, whole):
    """One rank without ZeRO, then two with ZeRO-3, then one with ZeRO-2: the run of one rank."""
    train = ["train", warm, run.override]
    mssr(*train, "train.steps=2").check()
    finish(mssr.ranks(2, *train, "train.steps=4", "train.zero_stage=3", "--resume"))
    mssr(*train, "train.zero_stage=2", "--resume").check()
    assert [line["step"] for line in run.metrics] == [line["step"] for line in whole.metrics]
    for mine, theirs in zip(run.metrics, whole.metrics):
        for key in ("train/reward", "train/grad_norm", "train/lr", "policy/entropy", "tracker/baseline_mean"):
            assert mine.get(key, 0) == pytest.approx(theirs.get(key, 0), rel=2e-3, abs=1e-5), (mine["step"], key)
