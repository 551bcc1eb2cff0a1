"""`mssr train` with every tracker, offline, killed and resumed; then each one's own reader says what it has stored."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml
from mssr_process import Moment
from PIL import Image

from mssr.config.schema import LogConfig

ALL = LogConfig.model_fields["trackers"].annotation.__args__[0].__args__
STEPS = [0, 1, 2, 3]
OFFLINE = {"WANDB_MODE": "offline", "SWANLAB_MODE": "offline"}


@pytest.fixture(scope="module")
def tracked(mssr, material, tmp_path_factory):
    """A run that was killed in its third step, after a checkpoint of the second, and resumed."""
    folder = tmp_path_factory.mktemp("tracked")
    home = folder / "home"
    home.mkdir()
    data = shutil.copy(
        material / "data" / "train.parquet", folder / "a+b.parquet"
    )  # a name that MLflow takes for no key
    columns = json.dumps({str(data): {"problem": "problem"}})
    command = [
        "train", material / "config.yaml", f"run_dir={folder / 'run'}", "train.steps=3", f"log.trackers=[{','.join(ALL)}]",
        "log.project=digits", "log.rollouts_saved=2", "train.async_save=false",
        f"data.train={data}", f"data.columns={columns}",
    ]  # fmt: skip
    environment = OFFLINE | {"HOME": str(home), "MPLCONFIGDIR": str(folder / "matplotlib")}
    killed = mssr(*command, at=Moment("os.rename", "step_000003"), **environment)
    assert killed.code == -9
    ended = mssr(*command, "--resume", **environment).check()
    assert ended.err == ""
    return folder / "run"


def by_step(lines, key):
    """Return the values of a metric by step: the third may be there twice, the resumed run's comes last."""
    assert [line["step"] for line in lines] in (STEPS, [0, 1, 2, 3, 3])
    return {line["step"]: line[key] for line in lines if key in line}


@pytest.fixture(scope="module")
def rewards(tracked):
    lines = [json.loads(line) for line in (tracked / "metrics.jsonl").read_text().splitlines()]
    found = by_step(lines, "train/reward")
    assert list(found) == STEPS[1:]
    return pytest.approx(found, rel=1e-6)


def is_the_picture(path):
    with Image.open(path) as image:
        return image.size == (112, 56)


pytestmark = pytest.mark.slow("40 s; the libraries of all trackers, offline")


def test_nothing_is_written_to_the_home_folder_and_no_process_is_left(tracked):
    home = str(tracked.parent / "home")
    assert os.listdir(home) == []
    assert set(json.loads((tracked / "trackers.json").read_text())) == set(ALL) - {"tensorboard"}
    ours = [one for one in psutil.process_iter(["environ"]) if (one.info["environ"] or {}).get("HOME") == home]
    _, alive = psutil.wait_procs(ours, timeout=60)
    assert [one for one in alive if one.status() != psutil.STATUS_ZOMBIE] == []


def test_tensorboard(tracked, rewards):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tracked / "tensorboard")).Reload()
    found = {event.step: event.value for event in board.Scalars("train/reward")}
    assert found == rewards and board.Tags()["images"] == ["curves"]


def test_wandb(tracked, rewards):
    (identity,) = {path.name.rpartition("-")[2] for path in tracked.glob("wandb/offline-run-*")}
    assert identity == json.loads((tracked / "trackers.json").read_text())["wandb"]
    records = []
    for path in sorted(tracked.glob("wandb/offline-run-*/run-*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        records += [json.loads(line) for line in out.splitlines()]
    runs = [record["run"] for record in records if record["type"] == "run"]
    assert {run["project"] for run in runs} == {"digits"} and {run["display_name"] for run in runs} == {"run"}
    assert runs[-1]["config"]["update"]["train.optimizer.lr"] == 1e-3
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    assert "curves.path" in history[-1]
    steps = [line for line in history if not {"rollouts.path", "curves.path"} & line.keys()]
    assert by_step(steps, "train/reward") == rewards
    artifact = [record["artifact"] for record in records if record["type"] == "artifact"][-1]
    files = {entry["path"]: entry["local_path"] for entry in artifact["manifest"]["contents"]}
    table = json.loads(Path(files["rollouts.table.json"]).read_text())
    first = dict(zip(table["columns"], table["data"][0]))
    assert first["problem"] and is_the_picture(files[first["image 1"]["path"]])


def test_mlflow(tracked, rewards):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tracked}/mlflow/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    assert run.info.run_id == json.loads((tracked / "trackers.json").read_text())["mlflow"]
    assert run.info.run_name == "run" and run.info.status == "FINISHED"
    assert run.data.params["train.optimizer.lr"] == "0.001"
    history = client.get_metric_history(run.info.run_id, "train/reward")
    found = {one.step: one.value for one in sorted(history, key=lambda one: one.timestamp)}
    assert found == rewards
    artifacts = tracked / "mlflow" / "artifacts" / run.info.run_id / "artifacts"
    table = json.loads((artifacts / "rollouts" / "step_000003.json").read_text())
    first = dict(zip(table["columns"], table["data"][-1]))
    assert (artifacts / "curves.png").is_file()
    assert first["problem"] and is_the_picture(artifacts / first["image 1"]["filepath"])


def test_trackio(tracked, rewards):
    with sqlite3.connect(tracked / "trackio" / "digits.db") as database:
        stored = database.execute("select run_id, run_name, step, metrics from metrics order by id").fetchall()
        (config,) = database.execute("select config from configs").fetchone()
    assert len({run for run, *_ in stored}) == 1 and {name for _, name, *_ in stored} == {"run"}
    lines = [{"step": step} | json.loads(values) for *_, step, values in stored]
    assert by_step([line for line in lines if not {"rollouts", "curves"} & line.keys()], "train/reward") == rewards
    assert json.loads(config)["train.optimizer.lr"] == 1e-3
    shown = [line for line in lines if "rollouts" in line][-1]
    first = shown["rollouts"]["_value"][0]
    assert shown["step"] == 3 and first["problem"] and "curves" in lines[-1]
    assert is_the_picture(tracked / "trackio" / "media" / first["image 1"]["file_path"])


def test_swanlab(tracked, rewards):
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    records = []
    for path in sorted(tracked.glob("swanlab/run-*/run-*.swanlab")):
        reader = DataStoreReader()
        reader.open(path)
        records += [Record.FromString(content) for content in reader]
    starts = [record.start for record in records if record.HasField("start")]
    identity = json.loads((tracked / "trackers.json").read_text())["swanlab"]
    assert {(start.project, start.name, start.id) for start in starts} == {("digits", "run", identity)}
    found = {
        record.scalar.step: record.scalar.value.number for record in records if record.scalar.key == "train/reward"
    }
    assert found == rewards
    folder = sorted(tracked.glob("swanlab/run-*"))[-1]
    assert yaml.safe_load((folder / "files" / "config.yaml").read_text())["train.optimizer.lr"]["value"] == 1e-3
    shown = [record.media for record in records if record.media.key == "rollouts/pictures"][-1]
    assert {record.media.step for record in records if record.media.key == "curves"} == {3}
    assert shown.step == 3 and "problem: " in shown.value.items[0].caption
    assert is_the_picture(folder / "media" / "image" / shown.value.items[0].filename)
