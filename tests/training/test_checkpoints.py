"""When a run saves checkpoints, and which it keeps."""

import json
import os
import shutil
import zipfile
from contextlib import closing
from pathlib import Path

import pytest
import torch
import yaml
from mssr_process import Moment
from run_folder import EmptyEngine

from mssr.config import load_config
from mssr.config.schema import TrainConfig
from mssr.distributed import ALONE
from mssr.errors import UserError
from mssr.training.checkpoint import Checkpoints, read_weights, saved_steps
from mssr.training.same_run import SameRun


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
    with closing(Checkpoints(tmp_path, ALONE, TrainConfig(checkpoint_minutes=10, checkpoint_every=100))) as checkpoints:
        now += 599
        assert not checkpoints.due(7)
        now += 1
        assert checkpoints.due(7) and checkpoints.due(100)


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_written_beside_the_training_or_in_it(mssr, warm, run, whole, asynchronous):
    mssr("train", warm, run.override, f"train.async_save={asynchronous}").check()
    assert run.checkpoints == whole.checkpoints
    run.assert_same_as(whole)


def write_step(folder, step, ranks=1):
    place = folder / "checkpoints" / f"step_{step:06d}"
    place.mkdir(parents=True)
    torch.save({"step": step, "ranks": ranks, "engine": {}, "best": None}, place / "state.pt")
    for rank in range(ranks):
        torch.save(
            {"pieces": {"head": {"start": 0, "master": torch.ones(99)}}, "random": {}}, place / f"rank_{rank}.pt"
        )
    return place


def resume(folder):
    with closing(Checkpoints(folder, ALONE, TrainConfig())) as checkpoints:
        state = checkpoints.newest_state(resume=True)
        checkpoints.load_engine(state, None)  # ends before it needs the engine


@pytest.mark.parametrize("name", ["state.pt", "rank_1.pt"])
@pytest.mark.parametrize("damage", ["empty", "cut", "text", "other", "gone"])
def test_a_damaged_file_is_named_with_the_step_to_fall_back_to(tmp_path, name, damage):
    write_step(tmp_path, 2)
    write_step(tmp_path, 4).joinpath("state.pt").write_bytes(b"")
    file = write_step(tmp_path, 6, ranks=2) / name
    if damage == "other":
        torch.save([1, 2], file)
    elif damage == "gone":
        file.unlink()
    else:
        whole = file.read_bytes()
        file.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "text": b"no space left on device\n"}[damage])
    with pytest.raises(UserError) as refused:
        resume(tmp_path)
    line = str(refused.value)
    assert line.startswith(f"{file}: ") and "\n" not in line
    assert f"step 2 is whole; to go on from there, remove {file.parent}" in line


@pytest.mark.parametrize("content", [b"\x80\x02h\x05.", b"\x80\x02)R.", b"\x80\x02K\x01}b.", b"\x80\x02K\x01K\x02s."])
def test_a_pickle_whose_commands_make_no_sense(tmp_path, content):
    state = write_step(tmp_path, 2) / "state.pt"
    with zipfile.ZipFile(state) as whole:
        records = {name: whole.read(name) for name in whole.namelist()}
    with zipfile.ZipFile(state, "w") as changed:
        for name, record in records.items():
            changed.writestr(name, content if name.endswith("data.pkl") else record)
    with pytest.raises(UserError, match="state.pt: damaged"):
        resume(tmp_path)


def test_an_empty_step_folder_without_another(tmp_path):
    folder = tmp_path / "checkpoints" / "step_000003"
    folder.mkdir(parents=True)
    with pytest.raises(UserError, match="state.pt: missing.*; no other checkpoint is whole; set another run_dir"):
        resume(tmp_path)


SETTINGS = TrainConfig(keep_checkpoints=1, async_save=False)


class Killed(BaseException):
    """Ends the process in a test as kill -9 would, except that `finally` runs."""


def test_the_best_survives_a_kill_before_it_is_noted(tmp_path, monkeypatch):
    """And a damaged note, which is for people."""
    rename, note = os.rename, tmp_path / "checkpoints" / "best.json"

    def killed(source, target):
        if Path(target) == note:
            raise Killed
        rename(source, target)

    with closing(Checkpoints(tmp_path, ALONE, SETTINGS)) as checkpoints:
        checkpoints.save(1, EmptyEngine(), {}, best=0.25)
        monkeypatch.setattr("os.rename", killed)
        with pytest.raises(Killed):
            checkpoints.save(2, EmptyEngine(), {}, best=0.5)
        monkeypatch.undo()
    note.write_text('{"step": 4, "accu')
    with closing(Checkpoints(tmp_path, ALONE, SETTINGS)) as checkpoints:
        checkpoints.newest_state(resume=True)
        assert not checkpoints.is_best(0.5) and checkpoints.is_best(0.75)
        for step in (3, 4):
            checkpoints.save(step, EmptyEngine(), {})
    assert sorted(path.name for path in note.parent.iterdir()) == ["best.json", "step_000002", "step_000004"]
    assert json.loads(note.read_text()) == {"step": 2, "accuracy": 0.5}


def test_an_old_checkpoint_that_cannot_be_removed_yet_does_not_end_the_run(tmp_path, monkeypatch):
    """On NFS a file that another host still reads stays as .nfs0001 until it is closed."""
    rmdir = os.rmdir

    def busy(path, **options):
        if ".partial_step" in str(path):
            raise OSError(39, "Directory not empty")
        rmdir(path, **options)

    monkeypatch.setattr("os.rmdir", busy)
    with closing(Checkpoints(tmp_path, ALONE, SETTINGS)) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, EmptyEngine(), {})
        assert saved_steps(tmp_path / "checkpoints") == [3]
        monkeypatch.undo()
        checkpoints.save(4, EmptyEngine(), {})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000004"]


def test_a_checkpoint_that_is_removed_while_it_is_read(tmp_path):
    folder = write_step(tmp_path, 2)
    write_step(tmp_path, 4)
    weights = read_weights(folder)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match=f"^{folder}: removed while it was read: .*; take a newer one$"):
        next(weights)


def test_the_command_line_says_so_too(mssr, warm, whole, run):
    shutil.copytree(whole.path, run.path)
    file = run.path / "checkpoints" / "step_000006" / "state.pt"
    file.write_bytes(b"")
    line = mssr("train", warm, run.override, "--resume").line
    assert line.startswith(f"{file}: damaged (0 bytes); step 4 is whole")
    assert mssr("export", run.path, "--out", run.path / "exported").line == line
    shutil.rmtree(file.parent)
    mssr("train", warm, run.override, "--resume").check()
    run.assert_same_as(whole)


def test_the_initial_model_is_the_one_at_the_start(material, tmp_path):
    """Its folder may change before the first checkpoint."""
    shutil.copytree(material / "untrained", tmp_path / "model")
    config = load_config(material / "config.yaml", [f"model.path={tmp_path / 'model'}"])
    same, before = SameRun("train", config), SameRun("train", config).state_dict("data")
    (tmp_path / "model" / "config.json").write_text("{}")
    assert same.state_dict("data") == before != SameRun("train", config).state_dict("data")


def test_export_reads_the_config_as_train_does(mssr, warm, whole, run):
    """A configuration that a person wrote may stay in the folder if it says the same."""
    shutil.copytree(whole.path, run.path)
    values = yaml.safe_load((run.path / "config.yaml").read_text())
    path, data = values["model"]["path"], values["data"]["train"]
    (run.path / "config.yaml").write_text(
        f"preset: paper\nmodel:\n  path: {path}\n  liger: off\ndata:\n  train: {data}\n"
    )
    mssr("export", run.path, "--out", run.path / "exported").check()
    assert "4194304" in (run.path / "exported" / "preprocessor_config.json").read_text()
    (run.path / "config.yaml").write_text("model:\n  path: [1]\n")
    assert mssr("export", run.path, "--out", run.path / "other").line.startswith(
        f"{run.path / 'config.yaml'}: model.path: "
    )
