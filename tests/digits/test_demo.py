"""The command of `make demo`, shortened: the files it writes and what it prints."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from examples.digits.demo import MARKER, set_earlier_demo_aside, summarise
from mssr.config import validate_config
from mssr.errors import UserError
from mssr.folder_lock import locked

CHECKOUT = Path(__file__).parents[2]
SHORT = [
    "sft.steps=3", "train.steps=2", "rollout.prompts_per_step=16", "train.responses_per_update=8", "eval.max_problems=16",
    "eval.every=1", "log.rollouts_every=1", "algorithm.tracker.n_init=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("demo") / "run"
    command = [sys.executable, "-m", "examples.digits.demo", "--seed", "3", "--run-dir", str(run_dir), *SHORT]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return run_dir, done.stdout


@pytest.mark.slow("30 s, shared by three tests: `make demo`, shortened")
def test_the_summary_has_what_it_promises_and_its_files_exist(finished):
    run_dir, _ = finished
    summary = json.loads((run_dir / "summary.json").read_text())
    promised = {"val_accuracy_before", "val_accuracy_after", "train_seconds", "total_seconds", "seed", "rollout_engine"}
    assert promised <= summary.keys()
    assert summary["seed"] == 3 and summary["steps"] == 2 and summary["rollout_engine"] == "vllm"
    assert 0 <= summary["val_accuracy_before"] <= 1 and 0 < summary["train_seconds"] < summary["total_seconds"]
    for name in ("curves", "metrics", "rollouts", "checkpoint", "model"):
        assert Path(summary[name]).exists(), name
    with Image.open(summary["curves"]) as picture:
        assert picture.width > 500 and len(picture.convert("RGB").getcolors(1 << 24)) > 20


@pytest.mark.slow("30 s, shared by three tests: `make demo`, shortened")
def test_it_prints_accuracy_before_and_after_and_where_to_look(finished):
    run_dir, printed = finished
    summary = json.loads((run_dir / "summary.json").read_text())
    assert f"{summary['val_accuracy_before']:.1%} before RL, {summary['val_accuracy_after']:.1%} after" in printed
    assert summary["curves"] in printed and summary["rollouts"] in printed


@pytest.mark.slow("30 s, shared by three tests: `make demo`, shortened")
def test_rollouts_are_saved_with_their_images(finished):
    run_dir, _ = finished
    folder = run_dir / "rollouts" / "step_000002"
    records = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    assert len(records) == 8 and len(list(folder.glob("*.png"))) == 8


def test_the_summary_has_the_first_and_the_last_validation_and_the_newest_files(tmp_path):
    accuracies = {0: 0.25, 2: 0.75, 4: 0.5}
    validations = {step: {"val/accuracy": accuracy} for step, accuracy in accuracies.items()}
    records = [{"step": step} | validations.get(step, {}) for step in range(6)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for name in ("step_000012", "step_000002", "step_000004"):
        (tmp_path / "rollouts" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    config = validate_config({
        "run_dir": str(tmp_path), "model": {"path": "unused"}, "data": {"train": "unused"}, "seed": 7, "device": "cpu",
        "algorithm": {"name": "mssr"}, "rollout": {"engine": "hf"},
    })  # fmt: skip
    assert summarise(config, train_seconds=12.34, total_seconds=56.78, curves=tmp_path / "curves.png") == {
        "val_accuracy_before": 0.25,
        "val_accuracy_after": 0.5,
        "train_seconds": 12.3,
        "total_seconds": 56.8,
        "seed": 7,
        "algorithm": "mssr",
        "rollout_engine": "hf",
        "steps": 5,
        "curves": str(tmp_path / "curves.png"),
        "metrics": str(tmp_path / "metrics.jsonl"),
        "rollouts": str(tmp_path / "rollouts" / "step_000012" / "index.html"),
        "checkpoint": str(tmp_path / "checkpoints" / "step_000012"),
        "model": str(tmp_path / "model"),
    }


def test_an_earlier_demo_is_kept_under_another_name_and_nothing_else_is_moved(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="exists and is not from a demo; choose another folder"):
        set_earlier_demo_aside(mine)
    assert (mine / "thesis.txt").exists()
    (mine / MARKER).write_text("")
    for number in (1, 2):
        set_earlier_demo_aside(mine)
        assert [path.name for path in mine.iterdir()] == [MARKER]
        assert (tmp_path / "mine.1" / "thesis.txt").read_text() == "years of work"
        assert (tmp_path / f"mine.{number}" / MARKER).exists()
    with locked(mine), pytest.raises(UserError, match="in use by process"):
        set_earlier_demo_aside(mine)
