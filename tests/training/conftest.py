"""Runs that several tests check."""

import os
import subprocess
import sys

import pytest
from run_folder import RunFolder


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path / "run")


@pytest.fixture(scope="session")
def whole(warm, tmp_path_factory):
    """An uninterrupted run of six steps in one process, started as a user would: `python -m mssr train`.

    Each step takes 16 of 64 prompts: step 4 ends the first epoch. Checkpoints at 2, 4 and 6; the last two are kept.
    """
    folder = RunFolder(tmp_path_factory.mktemp("whole") / "run")
    command = [sys.executable, "-m", "mssr", "train", str(warm), folder.override]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    folder.out = done.stdout
    return folder


@pytest.fixture(scope="session")
def whole_with_everything(mssr, warm, everything, tmp_path_factory):
    """Like `whole`, with options that put every kind of state into a checkpoint."""
    folder = RunFolder(tmp_path_factory.mktemp("whole_with_everything") / "run")
    mssr("train", warm, folder.override, *everything).check()
    return folder


@pytest.fixture(scope="session")
def everything():
    """Overrides: drift on each prompt's previous response, first rollouts, a frozen reference, ZeRO-2, a schedule."""
    return [
        "algorithm.tracker.drift=prompt",
        "algorithm.tracker.n_init=1",
        "algorithm.kl_coef=0.05",
        "algorithm.old_logp=recompute",
        "train.zero_stage=2",
        "train.optimizer.schedule=cosine",
    ]


@pytest.fixture
def single_process(monkeypatch):
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }.items():
        monkeypatch.setenv(name, value)
