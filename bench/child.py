"""Child processes: the one place where bench starts, listens to and ends them.

`Child` is a process in a session of its own, as a study's runs are. `events` is a measurement: `python -m MODULE` reads its
request, an object, from standard input and prints each result as one line of JSON.
"""

import contextlib
import json
import math
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = 3000  # characters of a failed measurement's output that are kept
POLL = 1.0  # seconds between looks at whether a rank has died


class Died(RuntimeError):
    """The process failed. The message says how; `output` is the end of what it wrote."""

    output = ""
    rank = 0


class OutOfTime(Died):
    """The time for the whole measurement ran out."""


@dataclass(frozen=True)
class Ended:
    """code: exit status, negative for a signal. cpu_seconds: user and system, of the process and its waited-for children."""

    code: int
    wall_seconds: float
    cpu_seconds: float


class Child:
    """A process in a session of its own: signals reach it and all processes that it started.

    Ctrl-C interrupts only the parent.
    """

    def __init__(self, command: Sequence[str], **options):
        """options: of subprocess.Popen."""
        self._began = time.monotonic()
        self.process = subprocess.Popen(command, start_new_session=True, **options)

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
    """Return ours with the checkout importable, and `changes`."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    changes = {name: str(value) for name, value in changes.items()}
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | changes


def events(
    module: str,
    request: dict,
    *,
    ends: float = math.inf,
    silence: float = math.inf,
    ranks: int | None = None,
    **changes,
) -> Iterator[dict]:
    """Yield each object that `python -m MODULE` prints. Closing the iterator ends the processes.

    Args:
        ends: when the time is up, by time.monotonic().
        silence: the most seconds between two objects.
        ranks: start so many processes, with torch.distributed's environment; None: one without it.
        changes: environment variables.

    Raises:
        OutOfTime: at `ends`.
        Died: a rank crashed, ended with an error, or was silent for too long.
    """
    own = [environment(**changes)]
    if ranks is not None:
        world = changes | {"WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
        own = [environment(**world, RANK=rank, LOCAL_RANK=rank) for rank in range(ranks)]
    with contextlib.ExitStack() as stack:
        lines: queue.Queue = queue.Queue()
        children, logs = [], [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in own]
        noise: list[str] = []  # what libraries print on standard output
        for rank, log in enumerate(logs):
            child = Child(
                [sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                cwd=ROOT, env=own[rank],
            )  # fmt: skip
            children.append(child)
            stack.callback(child.process.stdout.close)
            reader = threading.Thread(target=_read, args=(rank, child.process.stdout, lines), daemon=True)
            stack.callback(reader.join)
            stack.callback(child.end)  # first: the reader ends with the processes that hold the pipe
            reader.start()
        for child in children:
            with contextlib.suppress(BrokenPipeError), child.process.stdin:
                json.dump(request, child.process.stdin)
        try:
            yield from _listen(children, logs, lines, noise, ends, silence)
        except Died as error:
            for child in children:
                child.end()
            error.output = ("".join(noise) + _tail(logs[error.rank]))[-OUTPUT:]
            raise


def result(module: str, request: dict, *, limit: float, **options) -> dict:
    """Return the last object that a measurement prints, or {"error", "output"} if it fails or takes over `limit` seconds."""
    try:
        *_, found = events(module, request, ends=time.monotonic() + limit, **options)
        return found
    except OutOfTime as error:
        return {"error": f"took over {limit:.0f} s", "output": error.output}
    except Died as error:
        return {"error": str(error), "output": error.output}
    except ValueError:  # nothing to unpack
        return {"error": "ended without a result", "output": ""}


def say(**event) -> None:
    """In the child: print one object."""
    print(json.dumps(event), flush=True)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _read(rank: int, stream, lines: queue.Queue) -> None:
    for line in stream:
        lines.put((rank, line))
    lines.put((rank, None))


def _listen(
    children: list[Child], logs: list, lines: queue.Queue, noise: list[str], ends: float, silence: float
) -> Iterator[dict]:
    running, last = len(children), time.monotonic()
    while running:
        left, quiet = ends - time.monotonic(), last + silence - time.monotonic()
        try:
            rank, line = lines.get(timeout=max(0, min(left, quiet, POLL)))
        except queue.Empty:
            if left <= 0:
                raise OutOfTime("out of time") from None
            if quiet <= 0:
                raise Died(f"not done after {silence:.0f} s") from None
            for rank, child in enumerate(children):  # what it started may keep its pipe open
                if code := child.process.poll():
                    raise _died(rank, code, logs, len(children)) from None
            continue
        if line is None:
            running -= 1
            if code := children[rank].process.wait():
                raise _died(rank, code, logs, len(children))
        elif line.startswith('{"'):
            last = time.monotonic()
            yield json.loads(line)
            last = time.monotonic()
        else:
            noise.append(line)


def _died(rank: int, code: int, logs: list, ranks: int) -> Died:
    text = [line.strip() for line in _tail(logs[rank]).splitlines() if line.strip()]
    of = f"rank {rank}: " if ranks > 1 else ""
    error = Died(f"{of}exit code {code}: {text[-1][:200] if text else 'no message'}")
    error.rank = rank
    return error


def _tail(log) -> str:
    log.seek(0)
    return log.read()[-OUTPUT:]
