"""A measurement in a process of its own, which tells what it finds one line of JSON at a time."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class Died(RuntimeError):
    """The process did not end by itself and well. The message says how, with the last line that it wrote."""


class OutOfTime(Died):
    """The time for the whole was up."""


def events(module: str, kind: str, request: dict, ends: float, silence: float) -> Iterator[dict]:
    """Each object that `python -m MODULE KIND`, given `request` on standard input, prints on a line of its own.

    ends: of the time, by time.monotonic(); silence: seconds between two of them. Whoever stops listening ends the process.

    Raises:
        OutOfTime: at `ends`.
        Died: it crashed, ended with an error, or was silent for too long.
    """
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module, kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            env=environment, start_new_session=True,
        )  # fmt: skip
        lines = queue.Queue()
        reader = threading.Thread(target=lambda: [*map(lines.put, process.stdout), lines.put(None)], daemon=True)
        reader.start()
        try:
            with contextlib.suppress(BrokenPipeError), process.stdin:
                json.dump(request, process.stdin)
            yield from _listen(lines, ends, silence)
            code = process.wait()
            if code:
                raise Died(f"exit code {code}: {_last_line(log)}")
        finally:  # whatever it started goes with it
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            reader.join()
            process.stdout.close()


def _listen(lines: queue.Queue, ends: float, silence: float) -> Iterator[dict]:
    while True:
        left = ends - time.monotonic()
        try:
            line = lines.get(timeout=max(0, min(left, silence)))
        except queue.Empty:
            if left <= silence:
                raise OutOfTime("out of time") from None
            raise Died(f"not done after {silence:.0f} s") from None
        if line is None:
            return
        if line.startswith('{"'):
            yield json.loads(line)


def _last_line(log) -> str:
    log.seek(0)
    lines = [line.strip() for line in log.read().splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no message"
