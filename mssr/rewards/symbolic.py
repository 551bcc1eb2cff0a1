"""Decides in bounded time whether two answers are equal.

Most pairs are compared in this process (`mssr.rewards.compare`). Mathematics goes to a library: sympy can hang or use up all
memory on a sampled answer, and its own timeouts are signals, which neither interrupt C code nor work outside the main
thread. So it runs in a child process that is killed when it is late.
"""

import json
import math
import os
import select
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path

from mssr.errors import UserError
from mssr.rewards.compare import same_answer

MAX_CHARS = 1024  # longer answers are equal only if identical: parsing them takes seconds
MEMO_SIZE = 65_536  # answer pairs
START_TIMEOUT_S = 120.0  # importing sympy from a cold network disk

_WORKER = Path(__file__).with_name("worker.py")


class _WorkerDied(Exception):
    pass


class _OutOfTime(Exception):
    """The caller's time is over, before `timeout_s` is: the answers may be equal."""


class SymbolicChecker:
    """Compares answers; for one thread at a time. `timeouts` counts the comparisons that were killed or left out.

    The worker starts with the first comparison that needs it; identical strings, numbers, words and options do not.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.timeouts = 0
        self._worker: subprocess.Popen | None = None
        self._limit_s = self._spent_s = 0.0
        self._compare = lru_cache(MEMO_SIZE)(self._equal)

    def equal(self, predicted: str, gold: str, within_s: float = math.inf) -> bool:
        """Whether `predicted` equals `gold`; False if the library needs longer than `timeout_s` or `within_s` for them.

        Raises:
            UserError: the worker cannot be started, or died twice on this pair.
        """
        predicted, gold = predicted.strip(), gold.strip()
        if predicted == gold:
            return True
        if not predicted or not gold or max(len(predicted), len(gold)) > MAX_CHARS:
            return False
        self._limit_s, self._spent_s = min(self.timeout_s, within_s), 0.0
        try:
            return self._compare(predicted, gold)
        except _OutOfTime:
            self.timeouts += 1
            return False

    def _equal(self, predicted: str, gold: str) -> bool:
        try:
            return same_answer(predicted, gold, self._ask)
        except TimeoutError:
            if self._limit_s < self.timeout_s:
                raise _OutOfTime from None  # not remembered
            self.timeouts += 1
            return False

    def close(self) -> None:
        """Stop the worker. The next comparison starts another."""
        if self._worker is not None:
            self._worker.kill()
            self._worker.wait()
            self._worker.stdin.close()
            self._worker.stdout.close()
            self._worker = None

    def _ask(self, kind: str, predicted: str, gold: str) -> bool:
        question = json.dumps({"kind": kind, "predicted": predicted, "gold": gold}).encode() + b"\n"
        if self._limit_s <= self._spent_s:
            raise TimeoutError
        for _ in range(2):  # retry once: the worker may have been killed from outside (out of memory)
            worker = self._worker or self._start()
            started = time.monotonic()
            try:
                os.write(worker.stdin.fileno(), question)
                return _read_line(worker, self._limit_s - self._spent_s)["equal"]
            except TimeoutError:
                self.close()
                raise
            except (_WorkerDied, BrokenPipeError):
                code = worker.wait()
                self.close()
            finally:
                self._spent_s += time.monotonic() - started
        raise UserError(
            f"the symbolic check died twice (exit code {code}) comparing {predicted[:80]!r} with {gold[:80]!r}; "
            "is the machine out of memory?"
        )

    def _start(self) -> subprocess.Popen:
        # -P keeps the script's folder off the module path. Pure Python integers raise an exception where GMP aborts the
        # process.
        environment = os.environ | {"SYMPY_GROUND_TYPES": "python", "MPMATH_NOGMPY": "1"}
        alarm_s = math.ceil(self.timeout_s) + 10  # for the case that this process has died
        self._worker = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER), str(alarm_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=environment,
        )
        try:
            _read_line(self._worker, START_TIMEOUT_S)
        except (_WorkerDied, TimeoutError):
            self.close()
            raise UserError(
                "the symbolic check does not start (its own message is above); is math-verify installed?"
            ) from None
        return self._worker


def _read_line(worker: subprocess.Popen, timeout_s: float) -> dict:
    """Return the worker's next reply; TimeoutError if it is late, _WorkerDied if the worker ends without one."""
    replies = select.poll()  # not select(): a trainer with vLLM has more than 1024 open files
    replies.register(worker.stdout, select.POLLIN)
    deadline = time.monotonic() + timeout_s
    reply = b""
    while not reply.endswith(b"\n"):
        if not replies.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError
        chunk = os.read(worker.stdout.fileno(), 4096)
        if not chunk:
            raise _WorkerDied
        reply += chunk
    return json.loads(reply)
