"""No process outlives the one that started it, however that ends."""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mssr.errors import Interrupted
from mssr.guard import Guarded

ROOT = Path(__file__).parents[1]
NUMBERS = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
TREE = "sleep 600 & echo $! $$; wait"  # a command and what it started
# One that takes its time to end; the echo comes after the trap is set.
SAVES = "trap 'echo saved >> saved; exit' TERM; sleep 600 & echo $! $$; wait"
PARENT = "import sys; from mssr.guard import Guarded; Guarded(sys.argv[1:]).wait()"
# What a measurement of bench is: a module that reads its request, and has children of its own.
MEASUREMENT = """
import json, os, subprocess, sys
json.load(sys.stdin)
child = subprocess.Popen(["sleep", "600"])
print(json.dumps({"pids": [os.getpid(), child.pid]}), flush=True)
child.wait()
"""
BENCH = """
from bench import child
for event in child.events("one_of_bench", {}):
    print(*event["pids"], flush=True)
"""


@pytest.fixture
def start(tmp_path):
    """Start Python code that prints the process ids of its descendants; return its process and theirs."""
    started = []

    def start(code, *arguments):
        paths = [str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")]
        process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True, cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )  # fmt: skip
        started.append(process)
        pids = map(int, process.stdout.readline().split())
        return process, [os.pidfd_open(pid) for pid in pids]

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def all_end(descriptors):
    left = set(descriptors)
    while left:
        ended = select.select(left, [], [], 60)[0]
        if not ended:
            for descriptor in left:
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            return False
        left -= set(ended)
    return True


@pytest.mark.parametrize("twice", ["%s & wait", "(%s &); sleep 600"])
def test_what_left_the_session_ends_too(start, twice):
    parent, descendants = start(PARENT, "sh", "-c", twice % "setsid sh -c 'echo $$; exec sleep 600'")
    parent.kill()
    assert all_end(descendants)


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number.name)
def test_a_command_and_all_that_it_started_end_with_the_parent(start, number):
    parent, descendants = start(PARENT, "sh", "-c", TREE)
    parent.send_signal(number)
    assert all_end(descendants)


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number.name)
def test_a_command_of_a_command_ends_too(start, number):
    """As a measurement of `bench.kernels` in `bench.gpu`: each is in a session of its own."""
    parent, descendants = start(PARENT, sys.executable, "-c", PARENT, "sh", "-c", TREE)
    parent.send_signal(number)
    assert all_end(descendants)


def test_a_command_without_grace_ends_at_once(start):
    ignores = "trap '' TERM; sleep 600 & echo $! $$; wait"
    parent, descendants = start(PARENT.replace("[1:]", "[1:], grace_s=0"), "sh", "-c", ignores)
    parent.kill()
    assert all_end(descendants)


def test_kill_ends_what_the_command_started_too():
    daemon = "trap '' TERM; setsid sh -c 'echo $$ $PPID; exec sleep 600' & wait"
    with Guarded(["sh", "-c", daemon], stdout=subprocess.PIPE, text=True) as guarded:
        descendants = [os.pidfd_open(int(pid)) for pid in guarded.stdout.readline().split()]
        guarded.kill()
        assert guarded.wait(60) == -signal.SIGKILL
        assert all_end(descendants)
        guarded.kill()


def test_what_a_command_left_behind_ends_with_it():
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with Guarded(["sh", "-c", "setsid sleep 600 & echo $!; read _; exit 3"], **pipes) as guarded:
        left_behind = os.pidfd_open(int(guarded.stdout.readline()))
        guarded.stdin.close()
        assert all_end([left_behind])
        assert guarded.wait(60) == 3


def test_a_command_may_save_before_it_ends(start, tmp_path):
    parent, descendants = start(PARENT, "sh", "-c", SAVES)
    parent.kill()
    assert all_end(descendants)
    assert (tmp_path / "saved").read_text() == "saved\n"


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number.name)
def test_a_measurement_ends_with_the_benchmark(start, tmp_path, number):
    (tmp_path / "one_of_bench.py").write_text(MEASUREMENT)
    parent, descendants = start(BENCH)
    parent.send_signal(number)
    assert all_end(descendants)


def test_a_command_ends_with_its_guard():
    with Guarded(["sh", "-c", "echo $$; exec sleep 600"], stdout=subprocess.PIPE, text=True) as guarded:
        command = os.pidfd_open(int(guarded.stdout.readline()))
        os.kill(guarded.pid, signal.SIGKILL)
        assert all_end([command])


@pytest.mark.parametrize("script, code", [("exit 0", 0), ("exit 3", 3), ("kill -9 $$", -9), ("kill -TERM $$", -15)])
def test_the_exit_status_is_the_commands(script, code):
    assert Guarded(["sh", "-c", script]).finish() == code


def test_streams_are_the_commands():
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with Guarded(["sh", "-c", "cat; echo wrong >&2"], **pipes) as guarded:
        assert guarded.communicate("in") == ("in", "wrong\n")
    with Guarded(["/no/such/command"], **pipes) as guarded:
        assert guarded.communicate() == ("", "/no/such/command: No such file or directory\n")
    assert guarded.returncode == 127


SAVES_AT_CTRL_C = "import signal, sys; signal.signal(2, lambda *_: sys.exit(7)); print(flush=True); signal.pause()"


def test_ctrl_c_is_passed_on(monkeypatch):
    with Guarded([sys.executable, "-c", SAVES_AT_CTRL_C], stdout=subprocess.PIPE) as guarded:
        guarded.stdout.readline()
        waits = []

        def wait():
            waits.append(guarded)
            if len(waits) == 1:
                raise KeyboardInterrupt
            return Guarded.wait(guarded)

        monkeypatch.setattr(guarded, "wait", wait)
        assert guarded.finish() == 7
        monkeypatch.undo()


def test_another_exception_ends_the_command_first(monkeypatch):
    """As the handler of a study raises."""
    with Guarded(["sh", "-c", "echo; exec sleep 600"], stdout=subprocess.PIPE) as guarded:
        guarded.stdout.readline()
        waits = []

        def wait():
            waits.append(guarded)
            if len(waits) == 1:
                raise Interrupted(signal.SIGTERM, "stopped")
            return Guarded.wait(guarded)

        monkeypatch.setattr(guarded, "wait", wait)
        with pytest.raises(Interrupted):
            guarded.finish()
        monkeypatch.undo()
        assert guarded.returncode == -signal.SIGTERM


def test_ctrl_c_at_its_very_end(monkeypatch):
    with Guarded(["true"]) as guarded:
        code = guarded.wait()
        waits = []

        def wait():
            waits.append(guarded)
            if len(waits) == 1:
                raise KeyboardInterrupt
            return code

        monkeypatch.setattr(guarded, "wait", wait)
        assert guarded.finish() == 0
        monkeypatch.undo()
