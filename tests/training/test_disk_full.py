"""A full disk while saving gives a one-line error, and the previous checkpoint stays intact and resumable."""

import subprocess
import sys

import pytest
from mssr_process import Moment, free_port


def test_a_checkpoint_that_cannot_be_written(mssr, warm, run, whole):
    line = mssr("train", warm, run.override, at=Moment("os.mkdir", ".partial_step_000004", "full")).line
    assert "step_000004: could not be saved" in line
    assert "checkpoint of step 2 is intact" in line and "--resume" in line
    assert run.checkpoints == ["step_000002"]
    mssr("train", warm, run.override, "--resume").check()
    run.assert_same_as(whole)


def test_the_first_checkpoint_cannot_be_written(mssr, warm, run):
    line = mssr("train", warm, run.override, at=Moment("os.mkdir", ".partial_step_000002", "full")).line
    assert "there is no earlier checkpoint" in line
    assert run.checkpoints == []


def test_a_model_that_cannot_be_exported(mssr, warm, run):
    line = mssr("train", warm, run.override, "train.steps=2", at=Moment("os.mkdir", ".partial_model", "full")).line
    assert str(run.path / "model") in line and "--resume" in line
    assert run.checkpoints == ["step_000002"] and not (run.path / "model").exists()


@pytest.mark.parametrize("stage", [0, 2])
def test_a_rank_that_cannot_write_does_not_leave_the_other_waiting(mssr, warm, run, stage):
    full = Moment("os.mkdir", ".partial_step_000002", "full")
    for ended in mssr.ranks(2, "train", warm, run.override, f"train.zero_stage={stage}", at=full):
        assert ended.code == 2 and "Traceback" not in ended.err
        assert "step_000002: could not be saved: [Errno 27] File too large; there is no earlier" in ended.err
    assert not any(name.startswith("step_") for name in run.checkpoints)


@pytest.mark.slow("10 s: a real small disk under torchrun and two ranks")
def test_a_small_disk(warm, tmp_path):
    """A real disk of 12 MB and two ranks (a checkpoint takes 4.4 MB): all ranks refuse before writing."""
    disk, rescued = tmp_path / "disk", tmp_path / "rescued"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=12m none {disk}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs in a namespace of its own")
    launch = f"-m torch.distributed.run --nproc-per-node 2 --master-port {free_port()}"
    train = f"{sys.executable} {launch} -m mssr train {warm} run_dir={disk}/run"
    script = f"{mount}; {train}; code=$?; cp -r {disk}/run {rescued}; exit $code"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("mssr: ")]
    assert lines and all("step_000006: could not be saved: disk full" in line for line in lines), done.stderr
    assert all("checkpoint of step 4 is intact" in line for line in lines)
    assert sorted(path.name for path in (rescued / "checkpoints").iterdir()) == ["step_000002", "step_000004"]
