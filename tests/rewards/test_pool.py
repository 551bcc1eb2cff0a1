"""Whatever a reward function does, each call ends, the others are not affected, and no process is left."""

import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest
from PIL import Image
from pools import (
    BEHAVIOUR,
    ROW,
    fixture_of,
    function,
    kinds,
    line_of,
    open_pool,
    outcome,
    outcomes,
)

from mssr.rewards import pool as pool_module
from mssr.rewards.pulse import Pulse
from mssr.rewards.row import Row

patient = fixture_of("sync", timeout_s=60.0)  # the function imports numpy
sync = fixture_of("sync")


MISBEHAVIOUR = [
    ("loop", "timeout", "took more than 1 s"),
    ("fork hang", "timeout", "took more than 1 s"),
    ("raise", "error", r"ValueError: not so \(.*behaviour.py, line \d+\)"),
    ("explain", "error", "the answer is no number"),
    ("evil", "error", r".*Evil: <exception str.. failed>.*"),
    ("exit", "error", r"SystemExit: 3 \(.*"),
    ("interrupt", "error", r"KeyboardInterrupt \(.*"),
    ("recursion", "error", r"RecursionError: .*"),
    ("ask", "error", r"EOFError: .*"),
    ("end", "died", r"ended its process \(exit status 3\)"),
    ("segfault", "died", r"ended its process \(SIGSEGV\)"),
    ("killed", "died", r"ended its process \(SIGKILL: is the machine out of memory\?\)"),
    ("memory", "memory", r"MemoryError \(.*"),
    ("leak", "memory", r"MemoryError \(.*"),
    ("return nan", "result", "returned nan"),
    ("return inf", "result", "returned -inf as 'short'"),
    ("return none", "result", "returned None, not a number"),
    ("return text", "result", "returned str '1', not a number"),
    ("return complex", "result", r"returned complex 1j, not a number"),
    ("return list", "result", r"returned list \[1.0\], not a number"),
    ("return empty", "result", "returned a dict without parts"),
    ("return key", "result", "returned a dict with the key int 1; names of parts are text"),
    ("return nested", "result", "returned dict {'a': 1} as 'accuracy', not a number"),
]


@pytest.mark.parametrize("response, kind, message", MISBEHAVIOUR)
def test_one_failure_and_the_others_are_graded(sync, response, kind, message):
    found = outcomes(sync, "fine", "fine", response, "fine", "fine")
    assert kinds(found) == [None, None, kind, None, None]
    assert re.fullmatch(message, found[2].failure.message)
    assert found[2].parts is None and found[4].parts == {"accuracy": 1.0}
    assert outcome(sync, "fine").parts == {"accuracy": 1.0}


def test_the_traceback_says_where(sync, log):
    """In the failure, and once in the log: where it was raised, and where a call hangs."""
    lines = line_of('raise ValueError("not\\nso")'), line_of("time.sleep(600)")
    places = [f'File "{BEHAVIOUR}", line {line}' for line in lines]
    found = outcomes(sync, "raise", "raise", "hang", "fine")
    assert kinds(found) == ["error", "error", "timeout", None]
    for one, place in zip(found[1:], places):
        assert place in one.failure.traceback
        assert "rewards/worker.py" not in one.failure.traceback
        assert log.read_text().count(place) == 1


@pytest.mark.parametrize(
    "what, parts",
    [
        ("true", {"accuracy": 1.0}),
        ("fraction", {"accuracy": 0.5}),
        ("numpy", {"accuracy": 0.5, "short": -1.0}),
    ],
)
def test_numbers_of_all_kinds(patient, what, parts):
    assert outcome(patient, f"return {what}").parts == parts


def test_a_worker(sync):
    """It is out of the reach of Ctrl-C, has no torch, and gets what sympy needs."""
    assert [found.parts["accuracy"] for found in outcomes(sync, "neighbour", "torch", "ground")] == [0.75, 0, 1]
    assert outcome(sync, "session").parts["accuracy"] not in (os.getsid(0), 0)


def test_the_row_arrives(sync):
    file = io.BytesIO()
    Image.new("RGB", (5, 4), (200, 0, 0)).save(file, "PNG")
    columns = {"level": [1, {"a": "b"}]}
    row = Row("How many?", "3", "user: How many?", 7, 9, True, columns, (file.getvalue(),))
    assert row.images  # decoded here: not to be sent
    assert sync.submit("row", row).result(60).parts == {"red": 200, "size": 5}


class Unreadable:
    def __reduce__(self):
        return int, ("no number",)


@pytest.mark.parametrize("value", [threading.Lock(), Unreadable()])
def test_a_column_that_cannot_be_sent(sync, value):
    found = sync.submit("fine", Row("", "", columns={"level": value})).result(60)
    assert found.failure.kind == "error" and "Error" in found.failure.message
    assert outcome(sync, "fine").parts


def test_calls_from_many_threads(sync):
    numbers = list(map(str, range(500)))
    with ThreadPoolExecutor(8) as threads:
        futures = list(threads.map(lambda number: sync.submit("answer", Row("", number)), numbers))
    assert [future.result(60).parts["accuracy"] for future in futures] == list(map(float, numbers))


def test_a_large_response(sync):
    assert outcome(sync, "x" * 10_000_000).parts


def test_a_worker_that_is_killed_from_outside_is_no_failure(sync, tmp_path):
    """Nor are those that wait in it suspected of its end."""
    outcomes(sync, *["fine"] * 100)  # short calls, so that many wait
    first, second = (f"kill {tmp_path / name}" for name in ("first", "second"))
    assert kinds(outcomes(sync, first, "fine", second, "fine")) == [None] * 4


def test_a_function_that_forks(sync):
    assert [found.parts for found in outcomes(sync, *["fork"] * 3, "answer 5")] == [{"accuracy": 1.0}] * 4


def test_a_worker_that_begins_no_other_call_is_replaced(sync, tmp_path, monkeypatch):
    """A thread that a call left behind keeps it from that, in C code that does not let go of the interpreter."""
    monkeypatch.setattr(pool_module, "BETWEEN_S", 0.0)
    first, busy = outcomes(sync, "pid", f"busy {tmp_path / 'marker'}")
    assert busy.parts
    while (now := outcome(sync, "pid")).parts == first.parts:  # until the thread has begun
        pass
    assert now.parts


def test_a_waiting_call_can_be_cancelled(sync, tmp_path):
    running = sync.submit(f"wait {tmp_path / 'go'}", ROW)
    waiting = [sync.submit(f"nothing {tmp_path / 'called'}", ROW) for _ in range(200)]
    assert waiting[-1].cancel()
    for future in waiting:
        future.cancel()
    (tmp_path / "go").touch()
    assert running.result(60).parts
    assert outcome(sync, "fine").parts
    assert (tmp_path / "called").exists() == any(not future.cancelled() for future in waiting)


def test_close_while_a_call_hangs():
    pool = open_pool(function("sync"), timeout_s=600)
    hanging, waiting = pool.submit("hang", ROW), pool.submit("fine", ROW)
    pool.close()
    for future in hanging, waiting, pool.submit("fine", ROW):
        with pytest.raises(CancelledError):
            future.result(0)
    pool.close()


BEATS = """
import sys
from mssr.rewards.pulse import Pulse
pulse, job = Pulse(int(sys.argv[1])), 0
while job := job + 1:
    pulse.begin(job)
"""


def test_a_pulse_is_never_half_written(tmp_path):
    """A worker that seems to be at its job since long ago would be killed."""
    with open(tmp_path / "pulse", "w+b") as file:
        file.truncate(Pulse.SIZE)
        pulse, began = Pulse(file.fileno()), time.monotonic()
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", BEATS, str(file.fileno())]
        worker = subprocess.Popen(command, pass_fds=[file.fileno()], env=environment)
        try:
            while pulse.read()[0] == 0:
                assert worker.poll() is None
            for _ in range(120):  # moments at which it may stand still
                worker.send_signal(signal.SIGSTOP)
                os.waitid(os.P_PID, worker.pid, os.WSTOPPED)
                job, since = pulse.read()
                assert since > began
                worker.send_signal(signal.SIGCONT)
                while pulse.read()[0] == job:
                    os.sched_yield()
        finally:
            worker.kill()
            worker.wait()


TRAINER = """
import json, sys
from test_pool import *
pools = [open_pool(function(name, options=options), timeout_s=600) for name, options in json.loads(sys.argv[1])]
pools[0].submit("hang", ROW)
pools[1].submit("fine", ROW).result()
print("ready", flush=True)
time.sleep(600)
"""


def test_kill_9_of_the_trainer_leaves_nothing(tmp_path):
    files = [tmp_path / "hanging", tmp_path / "idle"]
    names = json.dumps([["starts_a_child", {"pids": str(file)}] for file in files])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(BEHAVIOUR.parent)])}
    trainer = subprocess.Popen([sys.executable, "-c", TRAINER, names], stdout=subprocess.PIPE, env=environment)
    assert trainer.stdout.readline() == b"ready\n"
    descendants = pids_of(files)
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    assert all_end(descendants)


@pytest.mark.parametrize("response", ["hang", "end"])
def test_what_a_lost_worker_started_ends(tmp_path, response):
    pool = open_pool(function("starts_a_child", options={"pids": str(tmp_path / "pids")}))
    future = pool.submit(response, ROW)
    descendants = pids_of([tmp_path / "pids"])
    (tmp_path / "pids_opened").touch()
    assert future.result(60).failure
    assert all_end(descendants)
    pool.close()


def pids_of(files):
    """Wait for the files; return descriptors of the processes that they name."""
    until = time.monotonic() + 60
    while not all(file.exists() and file.read_text().endswith("\n") for file in files):
        assert time.monotonic() < until
        time.sleep(0.005)
    return [os.pidfd_open(int(pid)) for file in files for pid in file.read_text().split()]


def all_end(descriptors):
    left = set(descriptors)
    while left and (ended := select.select(left, [], [], 60)[0]):
        left -= set(ended)
    for descriptor in left:
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    return not left
