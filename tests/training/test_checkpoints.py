"""When a run saves checkpoints, and which it keeps."""

import json
from contextlib import closing

import pytest
import torch
from mssr_process import Moment

from mssr.config.schema import TrainConfig
from mssr.distributed import World
from mssr.training.checkpoint import Checkpoints


def test_the_best_validation_is_kept_besides_the_newest(mssr, warm, run):
    settings = ["eval.every=1", "train.keep_best=true", "train.checkpoint_every=4", "train.keep_checkpoints=1"]
    mssr("train", warm, run.override, *settings, "train.steps=5").check()
    validations = {line["step"]: line["val/accuracy"] for line in run.metrics if line["step"]}
    best = max(validations, key=lambda step: (validations[step], -step))
    assert json.loads((run.path / "checkpoints" / "best.json").read_text()) == {
        "step": best,
        "accuracy": validations[best],
    }
    assert run.checkpoints == sorted({"best.json", f"step_{best:06d}", "step_000005"})


def test_the_best_is_remembered_by_a_resumed_run(mssr, warm, run):
    """The resumed part learns nothing, so that its validations are all the same."""
    settings = ["eval.every=1", "train.keep_best=true", "train.checkpoint_every=9", "train.keep_checkpoints=1"]
    mssr("train", warm, run.override, *settings, "train.steps=3").check()
    still = [*settings, "train.optimizer.lr=1e-12"]
    file = run.path / "checkpoints" / "best.json"
    mssr("train", warm, run.override, *still, "train.steps=4", "--resume").check()
    best = file.read_text()
    mssr("train", warm, run.override, *still, "--resume").check()
    accuracies = [line["val/accuracy"] for line in run.metrics[1:]]
    assert len(set(accuracies[3:])) == 1 and json.loads(best)["accuracy"] == max(accuracies)
    assert file.read_text() == best


def test_a_kill_before_the_best_is_noted(mssr, warm, run):
    settings = ["eval.every=1", "train.keep_best=true", "train.async_save=false"]
    killed = mssr("train", warm, run.override, *settings, at=Moment("os.rename", ".partial_best.json"))
    assert killed.code == -9 and ".partial_best.json" in run.checkpoints
    mssr("train", warm, run.override, *settings, "--resume").check()
    assert ".partial_best.json" not in run.checkpoints


def test_by_the_age_of_the_last_one(mssr, warm, run):
    settings = ["train.checkpoint_minutes=1e-6", "train.checkpoint_every=100", "train.keep_checkpoints=9"]
    mssr("train", warm, run.override, *settings, "train.steps=3").check()
    assert run.checkpoints == ["step_000001", "step_000002", "step_000003"]


def test_minutes_are_minutes(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr("mssr.training.checkpoint.time.monotonic", lambda: now)
    world = World(0, 1, torch.device("cpu"))
    with closing(Checkpoints(tmp_path, world, TrainConfig(checkpoint_minutes=10, checkpoint_every=100))) as checkpoints:
        now += 599
        assert not checkpoints.due(7)
        now += 1
        assert checkpoints.due(7) and checkpoints.due(100)


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_written_beside_the_training_or_in_it(mssr, warm, run, whole, asynchronous):
    mssr("train", warm, run.override, f"train.async_save={asynchronous}").check()
    assert run.checkpoints == whole.checkpoints
    run.assert_same_as(whole)
