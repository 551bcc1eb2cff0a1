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
from pathlib import Path

import pytest
from PIL import Image

from mssr.errors import UserError
from mssr.rewards import pool as pool_module
from mssr.rewards import reward_log
from mssr.rewards.function import handed_over, named
from mssr.rewards.pool import RewardPool
from mssr.rewards.pulse import Pulse
from mssr.rewards.row import Row

BEHAVIOUR = Path(__file__).with_name("behaviour.py")
ROW = Row("How many?", "3")
SETTINGS = dict(workers=1, timeout_s=1.0, memory_gib=1.0, batch_size=8, log=None)


def open_pool(function, **settings):
    return RewardPool(function, **SETTINGS | settings)


def function(name, **settings):
    return named(f"{BEHAVIOUR}:{name}", **settings)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    log = tmp_path_factory.mktemp("run") / "reward.log"
    log.touch()
    return log


def fixture_of(name, **settings):
    @pytest.fixture(scope="module")
    def pool(log):
        pool = open_pool(function(name), log=log, **settings)
        yield pool
        pool.close()

    return pool


patient = fixture_of("sync", timeout_s=60.0)  # the function imports numpy
sync, concurrent, batched = fixture_of("sync"), fixture_of("concurrent"), fixture_of("batched")


def outcomes(pool, *responses):
    """Submit the responses at once; each is its row's answer too."""
    futures = [pool.submit(response, Row("", response)) for response in responses]
    return [future.result(60) for future in futures]


def as_a_batch(pool, tmp_path, *responses):
    """Submit the responses to a new pool while it makes its first call, so that they are its second one."""
    first = pool.submit("first", Row("", "first", columns={"go": str(tmp_path / "go")}))
    while not first.running():
        time.sleep(0.005)
    futures = [pool.submit(response, Row("", response)) for response in responses]
    (tmp_path / "go").touch()
    return futures


def outcome(pool, response):
    return outcomes(pool, response)[0]


def kinds(found):
    return [one.failure.kind if one.failure else None for one in found]


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


def line_of(statement):
    return 1 + [line.strip() for line in BEHAVIOUR.read_text().splitlines()].index(statement)


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


def test_calls_of_a_late_batch_that_were_cancelled_are_not_made_again(tmp_path):
    pool = open_pool(function("batched"), timeout_s=0.5)
    futures = as_a_batch(pool, tmp_path, *["hang"] * 8)
    while not futures[-1].running():
        time.sleep(0.005)
    for future in futures:
        assert not future.cancel()
    for future in futures:
        with pytest.raises(CancelledError):
            future.result(60)
    assert outcome(pool, "fine").parts
    pool.close()


def test_async_calls_wait_together(concurrent):
    assert concurrent.kind == "async"
    assert kinds(outcomes(concurrent, *["all 200"] * 200)) == [None] * 200


def test_async_calls_that_do_not_end(concurrent):
    found = outcomes(concurrent, "waits", "hang", "waits", "stubborn", "waits")
    assert kinds(found) == [None, "timeout", None, "timeout", None]
    assert (
        f'File "{BEHAVIOUR}", line {line_of("await asyncio.sleep(600)")}, in concurrent' in found[1].failure.traceback
    )


@pytest.mark.parametrize(
    "response, kind, message",
    [
        ("block", "timeout", "took more than 1 s"),
        ("block below", "timeout", "took more than 1 s"),
        ("exit", "error", r"SystemExit: 3 \(.*"),
        ("exit below", "died", r"ended its process \(exit status 3\)"),
        ("end", "died", r"ended its process \(exit status 3\)"),
    ],
)
def test_one_async_call_fails(concurrent, response, kind, message):
    found = outcomes(concurrent, "waits", "waits", response, "waits", "waits")
    assert kinds(found) == [None, None, kind, None, None]
    assert re.fullmatch(message, found[2].failure.message)
    if kind == "timeout":
        assert f'File "{BEHAVIOUR}", line' in found[2].failure.traceback


def test_batches_are_as_large_as_allowed(batched):
    assert batched.kind == "batched"
    found = outcomes(batched, *["fine"] * 100)
    sizes = {one.parts["size"] for one in found}
    assert max(sizes) == 8


@pytest.mark.parametrize(
    "response, kind, message",
    [
        ("hang", "timeout", "took more than 1 s"),
        ("raise", "error", r"ValueError: not so \(.*"),
        ("end", "died", r"ended its process \(exit status 3\)"),
        ("nan", "result", "returned nan"),
        ("short", "result", "returned 0 results for 1 response"),
        ("text", "result", "returned str '1', not a list of 1 rewards"),
    ],
)
def test_of_a_batch_one_call_fails(batched, response, kind, message):
    found = outcomes(batched, *["fine"] * 5, response, *["fine"] * 6)
    assert kinds(found) == [None] * 5 + [kind] + [None] * 6
    assert re.fullmatch(message, found[5].failure.message)


def test_a_batch_of_the_wrong_length_is_in_the_log(tmp_path, log):
    pool = open_pool(function("batched"), log=log)
    futures = as_a_batch(pool, tmp_path, *["fine"] * 6, "short", "fine")
    assert kinds([future.result(60) for future in futures]) == [None] * 6 + ["result", None]
    assert re.search(
        r"a call with 8 responses, .* failed \(result\): returned 7 results for 8 responses", log.read_text()
    )
    pool.close()


def test_an_async_batch():
    pool = open_pool(function("async_batched"), workers=2, timeout_s=60.0)
    assert pool.kind == "batched"
    assert all(found.parts["accuracy"] >= 1 for found in outcomes(pool, *["fine"] * 20))
    pool.close()


def test_prints_are_cut(tmp_path):
    (tmp_path / "reward.log").touch()
    pool = open_pool(function("prints"), log=tmp_path / "reward.log", workers=2, timeout_s=60)
    assert kinds(outcomes(pool, *["go"] * 4)) == [None] * 4
    pool.close()
    text = (tmp_path / "reward.log").read_bytes()
    assert all(letter * 50 in text for letter in (b"p", b"e", b"c"))
    assert text.endswith(reward_log.FULL) and text.count(reward_log.FULL) == 1
    assert len(text) == reward_log.LIMIT + len(reward_log.FULL)


def test_prints_before_the_run_has_a_folder(tmp_path):
    file = tmp_path / "chatty.py"
    file.write_text("print('imported')\ndef f(response, row):\n    print('called')\n    return 1\n")
    pool = open_pool(named(f"{file}:f"), log=tmp_path / "run" / "reward.log")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "reward.log").touch()
    assert outcome(pool, "").parts
    pool.close()
    assert (tmp_path / "run" / "reward.log").read_text() == "imported\ncalled\n"


def test_nothing_is_written_into_a_folder_that_is_not_the_runs(tmp_path):
    file = tmp_path / "chatty.py"
    file.write_text("print('imported')\ndef f(response, row):\n    raise ValueError\n")
    (tmp_path / "run").mkdir()
    pool = open_pool(named(f"{file}:f"), log=tmp_path / "run" / "reward.log")
    assert outcome(pool, "").failure
    pool.close()
    assert not list((tmp_path / "run").iterdir())


def test_a_worker_that_starts_again_has_the_code_of_the_beginning(tmp_path):
    """And the time of an import is not that of a call."""
    file = tmp_path / "slow.py"
    source = (
        "import os, time\ntime.sleep(0.3)\ndef f(response, row):\n    return os._exit(3) if response == 'end' else {}\n"
    )
    file.write_text(source.format(1))
    pool = open_pool(named(f"{file}:f"), timeout_s=0.1)
    file.write_text(source.format(2))
    assert kinds(outcomes(pool, "end")) == ["died"]
    assert outcome(pool, "").parts == {"accuracy": 1}
    pool.close()


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("missing", {}, "no function missing there; the functions in it are sync, concurrent, .*, only_response"),
        ("NoFunction", {}, "no function NoFunction there; .*"),
        ("RETURNED", {}, "no function RETURNED there; .*"),
        (
            "sync",
            {"minus": 1},
            r"got an unexpected keyword argument 'minus'; it is called with \(response, row\) and its options \(minus\), "
            r"and its definition is sync\(response, row, plus=0.0\)",
        ),
        ("only_response", {}, r"too many positional arguments; .* only_response\(response\)"),
    ],
)
def test_a_function_that_does_not_fit(name, options, message):
    with pytest.raises(UserError) as raised:
        open_pool(function(name, options=options))
    assert re.fullmatch(rf"reward.function {re.escape(str(BEHAVIOUR))}:{name}: {message}", str(raised.value))


@pytest.mark.parametrize(
    "source, message",
    [
        ("import no_such_thing", r"importing it fails with ModuleNotFoundError: .* \({file}, line 1\)"),
        ("def f(:\n", r"importing it fails with SyntaxError: .* \({file}, line 1\)"),
        ("import sys; sys.exit(1)", r"importing it fails with SystemExit: 1 \({file}, line 1\)"),
        ("import os; os._exit(4)", r"its process ended 3 times while it was importing .*exit status 4.*"),
        ("", r"no function f there; there is no function in it"),
    ],
)
def test_a_file_that_cannot_be_imported(tmp_path, source, message):
    file = tmp_path / "mine.py"
    file.write_text(source)
    with pytest.raises(UserError) as raised:
        open_pool(named(f"{file}:f"))
    pattern = message.replace("{file}", re.escape(str(file)))
    assert re.fullmatch(f"reward.function {re.escape(str(file))}:f: {pattern}", str(raised.value))


@pytest.mark.parametrize(
    "where, message",
    [
        ("no/such.py:f", r"reward.function no/such.py:f: /.*/no/such.py: No such file or directory"),
        ("mine.py", "reward.function mine.py: name the function in the file too: mine.py:NAME"),
        (
            "__main__:score",
            r"reward.function __main__:score: a function of another Python process; give it again: train\(",
        ),
        ("notebook:f.<locals>.<lambda>", "reward.function notebook:f.<locals>.<lambda>: a function of another Python"),
        (
            "maths",
            "reward.function maths: no such built-in; one of .*, or path/to/file.py:NAME, or package.module:NAME",
        ),
    ],
)
def test_a_function_that_is_nowhere(where, message):
    with pytest.raises(UserError, match=message):
        named(where)


def test_a_function_of_a_package(tmp_path, monkeypatch):
    """Packages are found from the working folder; options arrive; its own time limit counts, and no other constant."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "rewards.py").write_text(
        "TIMEOUT_S = timeout_s = 0.001\ndef f(response, row, plus):\n    return 1 + plus\nf.timeout_s = 60\n"
    )
    monkeypatch.chdir(tmp_path)
    pool = open_pool(named("mine.rewards:f", label="short", options={"plus": 2}), timeout_s=0.001)
    assert outcome(pool, "").parts == {"short": 3.0}
    pool.close()
    with pytest.raises(UserError, match="mine.other:f: importing it fails with ModuleNotFoundError: No module named"):
        open_pool(named("mine.other:f"))


def test_images_are_sent_to_those_who_look(tmp_path):
    file = tmp_path / "blind.py"
    file.write_text("USES_IMAGES = False\ndef f(response, row):\n    return len(row.image_files)\n")
    pool = open_pool(named(f"{file}:f"))
    assert pool.submit("", Row("", "", image_files=(b"1", b"2"))).result(60).parts == {"accuracy": 0.0}
    pool.close()


def test_options_are_checked_by_the_function(tmp_path):
    file = tmp_path / "strict.py"
    file.write_text(
        "from mssr.errors import UserError\ndef f(response, row, **options):\n    return 1\n"
        "def check(**options):\n    raise UserError(f'n: must be positive, got {options}')\nf.check = check\n"
    )
    with pytest.raises(UserError, match=r"strict.py:f: n: must be positive, got {'n': 0}"):
        open_pool(named(f"{file}:f", options={"n": 0}))


def test_a_python_object():
    wanted = 7
    pool = open_pool(handed_over(lambda response, row: int(response) == wanted))
    assert [found.parts["accuracy"] for found in outcomes(pool, "7", "8")] == [1.0, 0.0]
    pool.close()


def test_python_objects_that_cannot_be_sent():
    lock = threading.Lock()
    with pytest.raises(UserError, match=r"cannot be sent to another process \(TypeError: cannot pickle .*lock"):
        handed_over(lambda response, row: lock)
    with pytest.raises(UserError, match="a float is no function"):
        handed_over(1.0)


def test_a_start_that_fails_later_ends_the_run(tmp_path):
    file = tmp_path / "once.py"
    file.write_text(
        f"import os\nif os.path.exists({str(tmp_path / 'gone')!r}):\n    os._exit(4)\n"
        "def f(response, row):\n    return os._exit(3) if response else 1\n"
    )
    pool = open_pool(named(f"{file}:f"))
    assert outcome(pool, "").parts
    (tmp_path / "gone").touch()
    assert kinds([outcome(pool, "end")]) == ["died"]
    for _ in range(2):
        with pytest.raises(UserError, match="its process ended 3 times while it was importing"):
            outcome(pool, "")
    pool.close()


def test_close_while_a_call_hangs():
    pool = open_pool(function("sync"), timeout_s=600)
    hanging, waiting = pool.submit("hang", ROW), pool.submit("fine", ROW)
    pool.close()
    for future in hanging, waiting, pool.submit("fine", ROW):
        with pytest.raises(CancelledError):
            future.result(0)
    pool.close()


@pytest.mark.slow("22 s: 2,048 calls of 20 ms keep two workers busy; 2,048 calls of 50 ms wait together")
@pytest.mark.parametrize(("name", "together"), [("waits_50_ms", 20), ("computes_20_ms", 1.6)])
def test_2048_calls(name, together):
    """Measured against the time inside the function, which a busy machine makes longer: 5.1 s and 26 s on an idle one."""
    pool = open_pool(function(name), workers=2, timeout_s=60)
    began = time.monotonic()
    found = outcomes(pool, *["go"] * 2048)
    seconds = time.monotonic() - began
    assert kinds(found) == [None] * 2048
    assert sum(one.seconds for one in found) / seconds > together  # calls at a time
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
