"""Two ranks match one rank with the same global batch, under every ZeRO stage."""

import json

import numpy as np
import pytest
from safetensors.torch import load_file

STEPS = 3


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_two_ranks_equal_one(mssr, warm, run, whole, stage):
    common = ["train", warm, run.override, f"train.zero_stage={stage}"]
    if stage == 1:  # in two parts, so that each rank's shard of the optimiser state is restored
        finish(mssr.ranks(2, *common, "train.steps=2"))
        common.append("--resume")
    finish(mssr.ranks(2, *common, f"train.steps={STEPS}"))
    assert [line["step"] for line in run.metrics] == list(range(STEPS + 1))
    for mine, theirs in zip(run.metrics, whole.metrics):
        for key, value in theirs.items():
            if not key.startswith("rollout/logp_gap"):  # which is only rounding noise
                assert np.ravel(mine[key]) == pytest.approx(np.ravel(value), rel=1e-3, abs=1e-5), (mine["step"], key)
    # Rank 0 saved its own eight rows of step 1: the global batch's first four of each update.
    rollouts = whole.rollouts(1)
    expected = [rollouts[slot] for slot in (0, 1, 2, 3, 8, 9, 10, 11)]
    for mine, theirs in zip(run.rollouts(1), expected, strict=True):
        assert (mine["row"], mine["response"], mine["reward"]) == (theirs["row"], theirs["response"], theirs["reward"])
        assert mine["advantage"] == pytest.approx(theirs["advantage"], rel=1e-5)


def finish(ranks):
    for rank, ended in enumerate(ranks):
        assert bool(ended.check().out) == (rank == 0)


def test_another_number_of_ranks_and_another_stage_go_on(mssr, warm, run, whole):
    """One rank without ZeRO, then two with ZeRO-3, then one with ZeRO-2: equal to a run on one rank."""
    train = ["train", warm, run.override]
    mssr(*train, "train.steps=2").check()
    finish(mssr.ranks(2, *train, "train.steps=4", "train.zero_stage=3", "--resume"))
    mssr(*train, "train.zero_stage=2", "--resume").check()
    assert [line["step"] for line in run.metrics] == [line["step"] for line in whole.metrics]
    for mine, theirs in zip(run.metrics, whole.metrics):
        for key in ("train/reward", "train/grad_norm", "train/lr", "policy/entropy", "tracker/baseline_mean"):
            assert mine.get(key, 0) == pytest.approx(theirs.get(key, 0), rel=2e-3, abs=1e-5), (mine["step"], key)


def test_shares_of_the_weights_equal_one_rank(mssr, warm, tmp_path):
    """ZeRO-3, interrupted and resumed. Of the five validation problems one rank has three, the other two."""
    common = [
        warm,
        "rollout.engine=hf",
        "train.steps=2",
        "train.checkpoint_every=1",
        "eval.every=1",
        "eval.max_problems=5",
    ]
    mssr("train", *common, f"run_dir={tmp_path / 'one'}", "train.zero_stage=0").check()
    split = [*common, f"run_dir={tmp_path / 'two'}", "train.zero_stage=3"]
    for override in ("train.steps=1", "train.steps=2"):
        resume = ["--resume"] if override == "train.steps=2" else []
        for ended in mssr.ranks(2, "train", *split, override, *resume):
            ended.check()
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert [line["step"] for line in two] == [line["step"] for line in one] == [0, 1, 2]
    for mine, theirs in zip(two, one):
        for key, value in theirs.items():
            if not any(word in key for word in ("time", "perf/", "memory/", "logp_gap", "cost/seconds")):
                assert np.ravel(mine[key]) == pytest.approx(np.ravel(value), rel=1e-3, abs=1e-5), (mine["step"], key)
        assert mine.get("rollout/logp_gap_max", 0) < 1e-4
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two")]
    assert weights[0].keys() == weights[1].keys()
    assert all((weights[0][name] - weights[1][name]).abs().mean() < 1e-5 for name in weights[0])


def test_supervised_validation_sees_the_trained_weights(mssr, material, tmp_path):
    settings = [
        material / "config.yaml",
        "rollout.engine=hf",
        "sft.steps=20",
        "sft.eval_every=20",
        "eval.max_problems=8",
    ]
    results = []
    for ranks_, stage in ((1, 0), (2, 3)):
        folder = tmp_path / str(ranks_)
        for ended in mssr.ranks(ranks_, "sft", *settings, f"run_dir={folder}", f"train.zero_stage={stage}"):
            ended.check()
        results.append(json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1]))
    assert results[0]["val/response_tokens"] == results[1]["val/response_tokens"]
