"""Child processes: the one place where bench starts, listens to and ends them.

`Child` is a process in a session of its own that ends with this one, such as a run of a study. `events` runs a
measurement: `python -m MODULE` reads its request, an object, from standard input and prints each result as a line of JSON.
"""

import contextlib
import json
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mssr.guard import Guarded

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = 3000  # characters of a failed measurement's output that are kept
POLL = 1.0  # seconds between checks whether the process has died


class Died(RuntimeError):
    """The process failed. The message says how; `output` is the end of what it wrote."""

    output = ""


class OutOfTime(Died):
    """The time limit of the whole measurement was reached."""


@dataclass(frozen=True)
class Ended:
    """code: exit status, negative for a signal. cpu_seconds: user and system, of the process and its waited-for children."""

    code: int
    wall_seconds: float
    cpu_seconds: float


class Child:
    """A process in a session of its own: signals reach it and all processes that it started.

    Ctrl-C interrupts only the parent; if the parent dies, all of them end.
    """

    def __init__(self, command: Sequence[str], **options):
        """options: of `Guarded`."""
        self._began = time.monotonic()
        self.process = Guarded(command, **options)

    def wait(self) -> Ended:
        """Block this thread until it ends; another thread may call `stop`."""
        _, status, usage = os.wait4(self.process.pid, 0)
        self.process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.monotonic() - self._began
        return Ended(self.process.returncode, wall, usage.ru_utime + usage.ru_stime)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Signal the process, if it still runs, and everything that it started."""
        if self.process.returncode is None:
            self._signal(number)

    def end(self) -> None:
        """Kill whatever is left of it."""
        self._signal(signal.SIGKILL)
        self.process.wait()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
            os.killpg(self.process.pid, number)


def environment(**changes) -> dict[str, str]:
    """Return our environment with the checkout importable, and `changes`."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    changes = {name: str(value) for name, value in changes.items()}
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | changes


def events(
    module: str, request: dict, *, ends: float = math.inf, silence: float = math.inf, **changes
) -> Iterator[dict]:
    """Yield each object that `python -m MODULE` prints. Closing the iterator ends the process.

    Args:
        ends: time limit, by time.monotonic().
        silence: the most seconds between two objects.
        changes: environment variables.

    Raises:
        OutOfTime: at `ends`.
        Died: it crashed, ended with an error, or was silent for too long.
    """
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(tempfile.TemporaryFile("w+"))
        lines: queue.Queue = queue.Queue()
        noise: list[str] = []  # what libraries print on standard output
        child = Child(
            [sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            cwd=ROOT, env=environment(**changes),
        )  # fmt: skip
        stack.callback(child.process.stdout.close)
        reader = threading.Thread(target=_read, args=(child.process.stdout, lines), daemon=True)
        stack.callback(reader.join)
        stack.callback(child.end)  # first: the reader ends with the processes that hold the pipe
        reader.start()
        with contextlib.suppress(BrokenPipeError), child.process.stdin:
            json.dump(request, child.process.stdin)
        try:
            yield from _listen(child, log, lines, noise, ends, silence)
        except Died as error:
            child.end()
            error.output = ("".join(noise) + _tail(log))[-OUTPUT:]
            raise


def result(name: str, module: str, request: dict, *, limit: float, **changes) -> dict:
    """Return the last object that a measurement prints, or {"error"} if it fails or takes over `limit` seconds.

    name: for the message on standard error, which has the output of a failed measurement.
    """
    try:
        *_, found = events(module, request, ends=time.monotonic() + limit, **changes)
        return found
    except Died as error:
        why = f"took over {limit:.0f} s" if isinstance(error, OutOfTime) else str(error)
        print(f"{name}: {why}\n{error.output}", file=sys.stderr)
        return {"error": why}


def say(**event) -> None:
    """In the child: print one object."""
    print(json.dumps(event), flush=True)


def _read(stream, lines: queue.Queue) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _listen(child: Child, log, lines: queue.Queue, noise: list[str], ends: float, silence: float) -> Iterator[dict]:
    last = time.monotonic()
    while True:
        left, quiet = ends - time.monotonic(), last + silence - time.monotonic()
        try:
            line = lines.get(timeout=max(0, min(left, quiet, POLL)))
        except queue.Empty:
            if left <= 0:
                raise OutOfTime("out of time") from None
            if quiet <= 0:
                raise Died(f"not done after {silence:.0f} s") from None
            if child.process.poll():  # what it started may keep its pipe open
                raise _died(child, log) from None
            continue
        if line is None:
            if child.process.wait():
                raise _died(child, log)
            return
        if line.startswith('{"'):
            yield json.loads(line)
            last = time.monotonic()
        else:
            noise.append(line)


def _died(child: Child, log) -> Died:
    text = [line.strip() for line in _tail(log).splitlines() if line.strip()]
    return Died(f"exit code {child.process.returncode}: {text[-1][:200] if text else 'no message'}")


def _tail(log) -> str:
    log.seek(0)
    return log.read()[-OUTPUT:]
