"""The command of `make demo`, shortened: the files it writes and what it prints."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from examples.digits.demo import MARKER, set_earlier_demo_aside
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
    for name in ("curves", "metrics", "rollouts", "checkpoint", "model", "card"):
        assert Path(summary["places"][name]).exists(), name
    with Image.open(summary["places"]["curves"]) as picture:
        assert picture.width > 500 and len(picture.convert("RGB").getcolors(1 << 24)) > 20


@pytest.mark.slow("30 s, shared by three tests: `make demo`, shortened")
def test_it_prints_accuracy_before_and_after_and_where_to_look(finished):
    run_dir, printed = finished
    summary = json.loads((run_dir / "summary.json").read_text())
    assert f"{summary['val_accuracy_before']:.1%} before RL, {summary['val_accuracy_after']:.1%} after" in printed
    assert summary["places"]["curves"] in printed and summary["places"]["rollouts"] in printed
    assert (
        printed.splitlines()[-1] == f"{summary['train_seconds']:.0f} s of RL, {summary['total_seconds']:.0f} s in all"
    )


@pytest.mark.slow("30 s, shared by three tests: `make demo`, shortened")
def test_rollouts_are_saved_with_their_images(finished):
    run_dir, _ = finished
    folder = run_dir / "rollouts" / "step_000002"
    records = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    assert len(records) == 8 and len(list(folder.glob("*.png"))) == 8


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
