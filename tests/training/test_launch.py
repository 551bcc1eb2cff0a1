"""`python -m mssr.launch`: how it ends. The ranks are a small script instead of a training run."""

import os
import select
import signal
import subprocess
import sys

import pytest
from torch.distributed.launcher import LaunchConfig

import mssr.launch

RANK = """
import os, signal, sys
signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
if sys.argv[1] == "ends with it":
    from mssr.distributed import end_with_launcher
    end_with_launcher()
print("started" if sys.argv[1] != "ends with it" else os.getpid(), flush=True)
if sys.argv[1] == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "fails":
    sys.exit(int(os.environ["RANK"]) * 3)
while True:
    signal.pause()
"""


@pytest.fixture
def launch(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(RANK)

    def start(*arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "mssr.launch", "--standalone", "--nproc-per-node", "2", str(script)]
        env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([*command, *arguments], **pipes, text=True, env=env)

    return start


def test_ctrl_c_ends_it_without_a_traceback(launch):
    process = launch("waits")
    assert [process.stdout.readline() for _ in range(2)] == ["started\n"] * 2
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")


def test_ranks_end_with_a_launcher_that_is_killed(launch):
    process = launch("ends with it")
    ranks = [os.pidfd_open(int(process.stdout.readline())) for _ in range(2)]
    process.kill()
    process.communicate(timeout=60)
    for rank in ranks:
        ended = select.select([rank], [], [], 30)[0]
        if not ended:
            signal.pidfd_send_signal(rank, signal.SIGKILL)
        os.close(rank)
        assert ended


def test_a_signal_that_killed_a_rank_is_named(launch):
    process = launch("dies")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL and err.endswith(" was ended by SIGKILL\n")


def test_ctrl_c_before_torchrun_handles_it(monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "")  # put back afterwards
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
    monkeypatch.setattr(mssr.launch.run, "main", interrupted)
    with pytest.raises(SystemExit) as ended:
        mssr.launch.main()
    assert ended.value.code == 130
    waits = getattr(LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=1), "shutdown_timeout", 900)
    assert waits == int(mssr.launch.SHUTDOWN_TIMEOUT_S)  # torch reads the variable, from 2.12 on


def test_nohup_is_respected(monkeypatch):
    handled = []
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "900")
    monkeypatch.setattr(mssr.launch.run, "main", lambda arguments: handled.append(arguments[1].split(",")))
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        mssr.launch.main()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        mssr.launch.main()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert set(handled[0]) - set(handled[1]) == {"SIGHUP"}


def test_a_rank_that_fails_gives_its_status(launch):
    process = launch("fails")
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (3, "mssr: rank 1 ended with exit status 3; its message is above\n")
