"""A run removes and overwrites nothing that it did not write: it is refused before it starts."""

import os
import shutil
import socket
from contextlib import closing

import pytest
import yaml
from run_folder import EmptyEngine

from mssr.config.schema import TrainConfig
from mssr.distributed import ALONE
from mssr.folder_lock import LOCK, locked
from mssr.outputs import RECORD
from mssr.training.checkpoint import Checkpoints


def snapshot(folder):
    files = [path for path in folder.rglob("*") if path.is_symlink() or path.is_file()]
    return {path: path.readlink() if path.is_symlink() else path.read_bytes() for path in files}


def a_model(folder, material):
    shutil.copytree(material / "untrained", folder / "model")
    (folder / "model" / "thesis.txt").write_text("years of work")
    return "model"


def a_link_to_a_model(folder, material):
    shutil.copytree(material / "untrained", folder / "other")
    (folder / "model").symlink_to("other")
    return "model"


def a_config(folder, _):
    (folder / "config.yaml").write_text("# mine\nmodel:\n  path: other\n")
    return "config.yaml"


def a_log_of_rewards(folder, _):
    (folder / "reward.log").write_text("mine")
    return "reward.log"


def rollouts(folder, _):
    (folder / "rollouts" / "step_000002").mkdir(parents=True)
    (folder / "rollouts" / "step_000002" / "labels.csv").write_text("1,good")
    return "rollouts/step_000002"


def other_checkpoints(folder, _):
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "epoch_3.pt").touch()
    return "checkpoints"


def a_file_of_checkpoints(folder, _):
    (folder / "checkpoints").write_text("where they are")
    return "checkpoints"


def a_link_to_no_rollouts(folder, _):
    (folder / "rollouts").symlink_to("nowhere")
    return "rollouts"


def a_readme(folder, _):
    (folder / "README.md").write_text("why I ran this")
    return "README.md"


def a_summary(folder, _):
    (folder / "summary.json").write_text("{}")
    return "summary.json"


def a_picture(folder, _):
    (folder / "curves.png").write_bytes(b"mine")
    return "curves.png"


def a_file_of_tensorboard(folder, _):
    (folder / "tensorboard").write_text("how to start it")
    return "tensorboard"


@pytest.mark.parametrize(
    "put",
    [
        a_model,
        a_link_to_a_model,
        a_config,
        a_log_of_rewards,
        rollouts,
        other_checkpoints,
        a_file_of_checkpoints,
        a_link_to_no_rollouts,
        a_file_of_tensorboard,
        a_readme,
        a_summary,
        a_picture,
    ],
)
def test_train_is_refused_and_everything_kept(mssr, material, run, put):
    run.path.mkdir()
    name = put(run.path, material)
    before = snapshot(run.path)
    line = mssr("train", material / "config.yaml", run.override, "train.steps=1").line
    assert line.startswith(f"{run.path / name}: ") and "set another run_dir" in line
    assert snapshot(run.path) == before


@pytest.mark.parametrize("name", ["trackers.json", "trackio"])
def test_what_is_where_a_tracker_would_write(mssr, material, run, name):
    run.path.mkdir()
    (run.path / name).write_text("mine")
    line = mssr("train", material / "config.yaml", run.override, "log.trackers=[trackio]").line
    assert line.startswith(f"{run.path / name}: ") and "set another run_dir" in line
    assert (run.path / name).read_text() == "mine"


@pytest.mark.parametrize("name", [LOCK, RECORD])
def test_a_symlink_in_place_of_our_own_file_is_not_followed(mssr, material, run, tmp_path, name):
    run.path.mkdir()
    (tmp_path / "mine.txt").write_text("years of work")
    (run.path / name).symlink_to(tmp_path / "mine.txt")
    line = mssr("train", material / "config.yaml", run.override, "train.steps=1").line
    assert line.startswith(f"run_dir {run.path}: cannot be written: ")
    assert (tmp_path / "mine.txt").read_text() == "years of work"


@pytest.mark.parametrize("there", ["a file", "a link to nothing"])
def test_a_run_dir_that_is_no_folder(mssr, material, run, there):
    run.path.write_text("mine") if there == "a file" else run.path.symlink_to("nowhere")
    line = mssr("train", material / "config.yaml", run.override).line
    assert line == f"run_dir {run.path}: a file, or a symlink to nothing, is there; name a folder"


@pytest.mark.parametrize("command", ["train", "sft"])
def test_a_start_that_the_result_would_replace(mssr, material, run, command):
    run.path.mkdir()
    a_model(run.path, material)
    before = snapshot(run.path)
    line = mssr(command, material / "config.yaml", run.override, f"model.path={run.path / 'model'}").line
    assert f"model.path {run.path / 'model'}: this run would replace it" in line
    assert snapshot(run.path) == before


def test_a_config_in_the_run_dir_that_says_the_same_stays_as_it_is(mssr, material, run):
    run.path.mkdir()
    values = yaml.safe_load((material / "config.yaml").read_text()) | {"run_dir": str(run.path)}
    values["sft"]["steps"] = 1
    config = run.path / "config.yaml"
    config.write_text("# my notes\n" + yaml.safe_dump(values))
    before = config.read_bytes()
    mssr("sft", config).check()
    assert config.read_bytes() == before and (run.path / "model" / "config.json").is_file()


def test_a_resumed_run_keeps_what_was_added_to_its_model(mssr, warm, whole, run):
    shutil.copytree(whole.path, run.path)
    (run.path / "model" / "notes.txt").write_text("mine")
    before = snapshot(run.path)
    line = mssr("train", warm, run.override, "train.steps=8", "--resume").line
    assert line.startswith(f"{run.path / 'model'}: not written by this run, or changed since")
    assert snapshot(run.path) == before


@pytest.mark.parametrize("arguments", [["train"], ["train", "--resume"], ["sft"]])
def test_a_run_dir_in_use(mssr, material, run, arguments):
    with locked(run.path):
        before = snapshot(run.path)
        line = mssr(*arguments[:1], material / "config.yaml", run.override, *arguments[1:]).line
        assert f"run_dir {run.path}: in use by process {os.getpid()} on {socket.gethostname()}" in line
        assert snapshot(run.path) == before


def test_both_ranks_end_when_the_folder_is_in_use(mssr, material, run):
    with locked(run.path):
        for ended in mssr.ranks(2, "train", material / "config.yaml", run.override):
            assert "in use by process" in ended.line


def test_both_ranks_end_when_the_metrics_are_another_runs(mssr, material, run):
    run.path.mkdir()
    (run.path / "metrics.jsonl").write_text("{}\n")
    for ended in mssr.ranks(2, "train", material / "config.yaml", run.override):
        assert "holds a run's metrics: set another run_dir" in ended.line


def test_old_checkpoints_with_other_files_or_behind_a_link_are_not_pruned(tmp_path):
    settings = TrainConfig(keep_checkpoints=1, async_save=False)
    folder = tmp_path / "run" / "checkpoints"
    with closing(Checkpoints(tmp_path / "run", ALONE, settings)) as checkpoints:
        for step in range(1, 6):
            checkpoints.save(step, EmptyEngine(), {})
            if step == 1:
                (folder / "step_000001" / "notes.txt").write_text("mine")
            if step == 2:
                (folder / "step_000002").rename(tmp_path / "moved")
                (folder / "step_000002").symlink_to(tmp_path / "moved")
                (folder / ".partial_thesis").mkdir()
    assert sorted(path.name for path in folder.iterdir()) == [
        ".partial_thesis", "step_000001", "step_000002", "step_000005",
    ]  # fmt: skip
    assert (tmp_path / "moved" / "state.pt").is_file()
