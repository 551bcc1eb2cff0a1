"""`make demo`'s command, cut short: what it leaves and what it says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from mssr.demo import MARKER, replace_earlier_demo
from mssr.errors import UserError

CHECKOUT = Path(__file__).parent.parent
SHORT = [
    "sft.steps=3", "train.steps=2", "rollout.prompts_per_step=16", "train.responses_per_update=8", "eval.max_problems=16",
    "eval.every=1", "log.rollouts_every=1", "algorithm.tracker.n_init=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("demo") / "run"
    command = [sys.executable, "-m", "mssr.demo", "--seed", "3", "--run-dir", str(run_dir), *SHORT]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return run_dir, done.stdout


@pytest.mark.slow("30 s for all that look at it: the README's first command, cut short")
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


@pytest.mark.slow("30 s for all that look at it: the README's first command, cut short")
def test_it_prints_accuracy_before_and_after_and_where_to_look(finished):
    run_dir, printed = finished
    summary = json.loads((run_dir / "summary.json").read_text())
    assert f"{summary['val_accuracy_before']:.1%} before RL, {summary['val_accuracy_after']:.1%} after" in printed
    assert summary["curves"] in printed and summary["rollouts"] in printed


@pytest.mark.slow("30 s for all that look at it: the README's first command, cut short")
def test_rollouts_are_saved_with_their_images(finished):
    run_dir, _ = finished
    folder = run_dir / "rollouts" / "step_000002"
    records = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    assert len(records) == 8 and len(list(folder.glob("*.png"))) == 8


def test_only_an_earlier_demo_is_replaced(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="exists and is not a demo's; name another folder"):
        replace_earlier_demo(mine)
    assert (mine / "thesis.txt").exists()
    (mine / MARKER).write_text("")
    replace_earlier_demo(mine)
    assert [path.name for path in mine.iterdir()] == [MARKER]
