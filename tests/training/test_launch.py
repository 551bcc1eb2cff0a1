"""`python -m mssr.launch`: how it ends. The ranks are a small script instead of a training run."""

import os
import signal
import subprocess
import sys

import pytest

RANK = """
import os, signal, sys
signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
print("started", flush=True)
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


def test_a_rank_that_fails_gives_its_status(launch):
    process = launch("fails")
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (3, "mssr: rank 1 ended with exit status 3; its message is above\n")
