"""`study` with real runs of a tiny model: interrupted and continued, failures reported, invalid files refused."""

import json
import os
import signal
from pathlib import Path

import pytest
import yaml

from bench.study.process import environment, last_line
from bench.study.report import write_report
from bench.study.results import load_results
from bench.study.runner import sole_user, start
from bench.study.study import study
from mssr.errors import UserError
from mssr.observe.metrics import read_metrics

UPDATES = 32  # of 16 steps


@pytest.fixture
def write(material, tmp_path):
    def write(arms, **keys) -> Path:
        path = tmp_path / "toy.yaml"
        spec = {
            "out": str(tmp_path / "out"),
            "question": "Which?",
            "config": str(material / "config.yaml"),
            "set": {"log.trackers": [], "train.async_save": False, "eval.max_problems": 8},
            "seeds": [5],
            "match": "updates",
            "budget": UPDATES,
            "arms": arms,
        }
        path.write_text(yaml.safe_dump(spec | keys, sort_keys=False))
        return path

    return write


def writers_of(folder):
    """Return the processes whose command line names the folder."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
        except OSError:  # it has ended
            continue
        if any(word.startswith(f"run_dir={folder}".encode()) for word in words):
            found.append(int(entry.name))
    return found


ARMS = {
    "wild": {"train.optimizer.lr": 1e30, "train.optimizer.grad_clip": 1e30},
    "base": {"algorithm.name": "mssr", "train.checkpoint_every": 1},
}
CLAIM = {"text": "Care pays.", "higher": "base", "lower": "wild"}


@pytest.mark.slow("22 s: a dozen processes; its parts have tests of their own")
def test_a_study_that_is_stopped_and_continued(write, mssr, tmp_path):
    path = write({**ARMS, "broken": {"data.train": str(tmp_path / "nowhere.parquet")}}, claims=[CLAIM])
    out = tmp_path / "out"
    wild, base, broken = (out / "runs" / arm / "seed_5" for arm in ("wild", "base", "broken"))

    # Stopped by a signal in the second run: it saves, every process ends, and the message says how to continue.
    study = mssr.start("-m", "bench.study", "run", path)
    study.until((base / "checkpoints" / "step_000002").exists)
    with pytest.raises(UserError, match="in use by another study, or by a run"), sole_user(out):
        pass
    os.kill(study.pid, signal.SIGTERM)
    ended = study.wait()
    assert ended.code == 128 + signal.SIGTERM
    assert "SIGTERM: runs were stopped; the same command continues them" in ended.err
    assert "[1/3] wild seed 5 diverged" in ended.out
    assert writers_of(out) == []
    steps = len(read_metrics(base / "metrics.jsonl"))
    assert not (base / "finished.json").exists() and 2 < steps < 17

    # Runs that are finished by then are in the table and in a report.
    assert load_results(out).missing == ["base seed 5", "broken seed 5"]
    assert "| wild | 0.0 |" in (out / "table.md").read_text()
    page = write_report([out], tmp_path / "STUDY.md").read_text()
    assert "**1 of 3 runs (the others are not finished)**" in page and "no seed has finished in both arms" in page

    # Continued: one run ends by its budget, one has diverged, which is a result, and one fails, which is reported.
    line = mssr("-m", "bench.study", "run", path, "--jobs", "2").line
    assert "1 of 3 runs failed" in line and "broken seed 5: " in line and "nowhere.parquet" in line
    finished = json.loads((base / "finished.json").read_text())
    assert finished["end"] == "budget" and finished["attempts"] == 2
    assert finished["cpu_seconds"] > 0 and finished["wall_seconds"] > 0
    assert [record["step"] for record in read_metrics(base / "metrics.jsonl")] == list(range(17))
    assert json.loads((wild / "finished.json").read_text())["end"] == "diverged"
    assert not (broken / "finished.json").exists() and "nowhere.parquet" in last_line(broken / "log.txt")
    results = load_results(out)
    by_arm = {run.arm: run for run in results.runs}
    assert by_arm["base"].spent["updates"] == UPDATES and by_arm["base"].spent["rollouts"] == 16 * 16
    assert by_arm["wild"].collapsed and results.missing == ["broken seed 5"]
    assert len(json.loads((out / "table.json").read_text())) == 2

    # Without the failing arm nothing is left to run, and the table is shown.
    before = {run: (run / "finished.json").stat().st_mtime_ns for run in (base, wild)}
    shown = mssr("-m", "bench.study", "run", write(ARMS, claims=[CLAIM])).check().out
    assert {run: (run / "finished.json").stat().st_mtime_ns for run in (base, wild)} == before
    assert "2 runs, 2 of them finished before" in shown and "| base |" in shown and "curves.png" in shown
    assert (out / "curves.png").is_file() and (out / "arms.png").is_file()

    # Another configuration under an old name would mix two studies.
    line = mssr("-m", "bench.study", "run", write({**ARMS, "base": {"train.optimizer.lr": 2e-3}})).line
    assert line.startswith("arm base, seed 5: train.optimizer.lr is 0.002, the run in ") and "had 0.001;" in line


def test_a_wrong_key_starts_nothing(write, tmp_path):
    with pytest.raises(UserError, match=r"toy\.yaml: arm bad: .*unknown key train\.stps.*did you mean train\.steps\?"):
        study(write({"good": {}, "bad": {"train.stps": 3}}))
    assert not (tmp_path / "out").exists()


def test_a_gpu_that_is_not_there_starts_nothing(write, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="^device: cuda, but torch sees no GPU"):
        study(write({"base": {}, "gpu": {"device": "cuda"}}))
    assert not (tmp_path / "out").exists()


def test_a_cut_record_of_sessions_is_named(write, tmp_path):
    path = write({"base": {}})
    with sole_user(tmp_path / "out"):
        pass
    (tmp_path / "out" / "sessions.jsonl").write_text('{"seconds": 2.0}\n{"seco')
    with pytest.raises(UserError, match=r"sessions\.jsonl, line 2: damaged; remove the line"):
        study(path)


@pytest.mark.parametrize(
    "text, line",
    [
        ("step 1\nmssr: no such file\nE1120 torchrun says more\n", "no such file"),
        ("mssr: no such file\nmssr: rank 1 ended with exit status 2; its message is above\n", "no such file"),
        ("ValueError: 3\nmssr: rank 1 ended with exit status 1; its message is above\n", "ValueError: 3"),
        ("mssr: rank 1 was ended by SIGKILL\n", "rank 1 was ended by SIGKILL"),
        ("Traceback\n  File\nValueError: 3\n\n", "ValueError: 3"),
        ("", "no output"),
    ],
)
def test_the_reason_of_a_failure_is_the_error_line_or_the_last_line(tmp_path, text, line):
    (tmp_path / "log.txt").write_text(text)
    assert last_line(tmp_path / "log.txt") == line


def test_gpus_are_distributed():
    gpus = ["4", "5", "6", "7"]
    assert [environment(slot, 2, gpus)["CUDA_VISIBLE_DEVICES"] for slot in (0, 1)] == ["4,5", "6,7"]
    assert [environment(slot, 1, gpus[:2])["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["4", "5", "4"]


def test_a_run_that_a_killed_study_left_behind_keeps_the_folder(tmp_path):
    """Two processes must never write one run."""
    with sole_user(tmp_path / "out") as lock:
        child = start(["sleep", "100"], dict(os.environ), tmp_path / "log.txt", lock)
    with pytest.raises(UserError, match="a run that a killed study left behind"), sole_user(tmp_path / "out"):
        pass
    child.stop(signal.SIGKILL)
    assert child.wait().code == -signal.SIGKILL
    with sole_user(tmp_path / "out"):
        pass


def test_a_folder_with_other_files_is_no_study(tmp_path):
    (tmp_path / "config.yaml").write_text("mine")
    with pytest.raises(UserError, match="holds files, but not of a study; name another folder"), sole_user(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
