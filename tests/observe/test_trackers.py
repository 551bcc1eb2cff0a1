"""Trackers get the run's metrics, settings and rollouts; one that fails does not end the run.

Trackio stands for those that run in processes of their own: it starts in a second. tests/training/test_all_trackers.py
trains with all of them.
"""

import json
import sqlite3
import sys

import psutil
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from mssr.config.schema import LogConfig
from mssr.errors import UserError
from mssr.observe.trackers import apart
from mssr.observe.trackers.trackers import Trackers, require_installed

SETTINGS = {"train.steps": 3, "model.path": "tiny"}


def trackers(run_dir, *names, first_step=0):
    return Trackers(run_dir, LogConfig(trackers=list(names)), SETTINGS, first_step)


def saved_rollouts(run_dir, images=("000_0.png",)):
    """As `save_rollouts` writes them: one with pictures, one without."""
    folder = run_dir / "rollouts" / "step_000002"
    folder.mkdir(parents=True)
    record = {
        "problem": "1+\u2028?",
        "response": "\\boxed{3}",
        "reward": 0.5,
        "parts": {"accuracy": 1.0},
        "advantage": None,
    }
    lines = [record | {"images": list(images)}, record | {"images": []}]
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    Image.new("RGB", (8, 8), "red").save(folder / "000_0.png")
    return folder


def rows(run_dir):
    """Return (run id, step, values) of everything that Trackio stored."""
    with sqlite3.connect(run_dir / "trackio" / "mssr.db") as database:
        found = database.execute("select run_id, step, metrics from metrics order by id").fetchall()
    return [(run, step, json.loads(values)) for run, step, values in found]


def test_tensorboard_gets_scalars_settings_and_curves(tmp_path):
    picture = saved_rollouts(tmp_path) / "000_0.png"
    with trackers(tmp_path, "tensorboard") as opened:
        opened.scalars(1, {"tracker/bins": [[2, 0.5, 1.0]], "tracker/brier": 0.25})
        opened.rollouts(1, picture.parent)
        opened.curves(picture)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert board.Tags()["scalars"] == ["tracker/brier"] and board.Tags()["images"] == ["curves"]
    assert b'| model.path | "tiny" |' in board.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


def test_tensorboard_shows_a_resumed_run_as_one(tmp_path):
    with trackers(tmp_path, "tensorboard") as opened:
        opened.scalars(1, {"train/reward": 0.1})
        opened.scalars(2, {"train/reward": 99.0})
    with trackers(tmp_path, "tensorboard", first_step=2) as opened:
        opened.scalars(2, {"train/reward": 0.2})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/reward")
    assert [(event.step, round(event.value, 3)) for event in events] == [(1, 0.1), (2, 0.2)]


def test_a_tensorboard_folder_that_is_gone(tmp_path, monkeypatch, capsys):
    """Its thread fails some time after a step; the next call, or the end, tells."""

    def gone(*_):
        raise FileNotFoundError(2, "No such file or directory")

    for name in ("written", "ended"):
        (tmp_path / name).mkdir()
    written, ended = (trackers(tmp_path / name, "tensorboard") for name in ("written", "ended"))
    monkeypatch.setattr(SummaryWriter, "add_scalar", gone)
    monkeypatch.setattr(SummaryWriter, "close", gone)
    with (
        pytest.raises(UserError, match="^.*/written/tensorboard: cannot be written: No such file or directory$"),
        written,
    ):
        written.scalars(1, {"train/reward": 0.5})
    assert capsys.readouterr().err == ""
    with ended:
        pass
    assert "ended/tensorboard: its last lines cannot be written: No such file" in capsys.readouterr().err


def test_without_trackers_there_is_nothing(tmp_path):
    with trackers(tmp_path) as opened:
        opened.scalars(1, {"train/reward": 0.5})
        opened.rollouts(1, saved_rollouts(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["rollouts"]


def test_a_resumed_run_continues_in_its_tracker_and_a_new_one_does_not(tmp_path, capfd):
    folder = saved_rollouts(tmp_path)
    with trackers(tmp_path, "trackio") as opened:
        opened.scalars(1, {"train/reward": 0.1, "tracker/bins": [[2]]})
        opened.scalars(2, {"train/reward": 0.2})
        opened.rollouts(2, folder)
    with trackers(tmp_path, "trackio", first_step=2) as opened:
        opened.scalars(2, {"train/reward": 0.3})
        opened.curves(folder / "000_0.png")
    out, err = capfd.readouterr()
    assert err == "" and [line.split(":")[:2] for line in out.splitlines()] == [
        ["mssr", " starting trackio"], ["mssr", " trackio"],
    ] * 2  # fmt: skip
    first, second, table, again, curves = rows(tmp_path)
    assert len({run for run, *_ in rows(tmp_path)}) == 1
    assert [one[1:] for one in (first, second, again)] == [
        (1, {"train/reward": 0.1}), (2, {"train/reward": 0.2}), (2, {"train/reward": 0.3}),
    ]  # fmt: skip
    with_picture, without = table[2]["rollouts"]["_value"]
    assert with_picture["problem"] == "1+\u2028?" and with_picture["parts/accuracy"] == 1.0
    assert without["image 1"] is None
    for picture in (with_picture["image 1"], curves[2]["curves"]):
        with Image.open(tmp_path / "trackio" / "media" / picture["file_path"]) as image:
            assert image.size == (8, 8)
    with sqlite3.connect(tmp_path / "trackio" / "mssr.db") as database:
        (config,) = database.execute("select config from configs").fetchone()
    assert json.loads(config)["model.path"] == "tiny"

    with trackers(tmp_path, "trackio") as opened:  # as after an attempt that ended before its first checkpoint
        opened.scalars(0, {"train/reward": 0.4})
    assert len({run for run, *_ in rows(tmp_path)}) == 2


def test_a_tracker_that_fails_is_said_once_and_the_others_go_on(tmp_path, capfd):
    folder = saved_rollouts(tmp_path, images=["gone.png"])
    with trackers(tmp_path, "trackio", "tensorboard") as opened:
        opened.scalars(1, {"train/reward": 0.1})
        opened.rollouts(1, folder)
        for step in range(2, 200):
            opened.scalars(step, {"train/reward": 0.1})
    (line,) = capfd.readouterr().err.splitlines()
    assert (
        line.startswith("mssr: log.trackers trackio: ValueError: ") and "gone.png; what it does not have is in" in line
    )
    assert f"{tmp_path}/trackio/output.log" in line and "Traceback" in (tmp_path / "trackio/output.log").read_text()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert len(board.Scalars("train/reward")) == 199


def test_a_tracker_that_hangs_neither_stalls_the_run_nor_its_end(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(apart, "CLOSE_S", 0.1)
    others = psutil.Process().children()
    with trackers(tmp_path, "trackio") as opened:
        (child,) = set(psutil.Process().children()) - set(others)
        child.suspend()
        for step in range(100):  # more than a pipe holds
            opened.scalars(step, {f"train/metric {number}": 0.5 for number in range(100)})
    assert not child.is_running()
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("mssr: log.trackers trackio: ended by SIGKILL; what it does not have is in metrics.jsonl")


def test_a_tracker_that_cannot_start_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_SERVER_URL", "http://127.0.0.1:9")
    with pytest.raises(
        UserError, match="^log.trackers trackio: ValueError: Self-hosted logging requires a write token"
    ):
        trackers(tmp_path, "tensorboard", "trackio")


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UserError) as error:
        require_installed(["tensorboard", "mlflow"])
    assert str(error.value) == (
        "log.trackers mlflow: mlflow-skinny is not installed; it is in the extra `mlflow`: in the checkout, "
        "pip install -e '.[mlflow]'"
    )
    monkeypatch.delitem(sys.modules, "mlflow")
    (tmp_path / "swanlab").mkdir()  # a folder beside the user's files is no library
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "swanlab", raising=False)  # of another test
    with pytest.raises(UserError, match="log.trackers swanlab: swanlab is not installed"):
        require_installed(["swanlab"])


def test_ids_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "trackers.json").write_text("{")
    with pytest.raises(UserError, match="trackers.json: not JSON"):
        trackers(tmp_path, "tensorboard", first_step=1)
