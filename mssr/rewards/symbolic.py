"""Decides in bounded time whether two answers are mathematically equal.

math-verify (sympy) can hang or use up all memory on a sampled answer. Its own timeouts are signals, which neither
interrupt C code nor work outside the main thread. So it runs in a child process that is killed when it is late.
"""

import json
import math
import os
import re
import select
import subprocess
import sys
import time
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

from mssr.errors import UserError

MAX_CHARS = 1024  # longer answers are equal only if identical: parsing them takes seconds
MEMO_SIZE = 65_536  # answer pairs
START_TIMEOUT_S = 120.0  # importing sympy from a cold network disk

_INTEGER = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)|[+-]?[0-9]+/0*[1-9][0-9]*")
_WORKER = Path(__file__).with_name("worker.py")


class _WorkerDied(Exception):
    pass


class SymbolicChecker:
    """Compares answers; for one thread at a time. `timeouts` counts the comparisons that were killed.

    The worker starts with the first comparison that needs it; identical strings and plain numbers do not.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.timeouts = 0
        self._worker: subprocess.Popen | None = None
        self._compare = lru_cache(MEMO_SIZE)(self._ask)

    def equal(self, predicted: str, gold: str) -> bool:
        """Whether `predicted` equals `gold`; False if the comparison takes longer than `timeout_s`.

        Raises:
            UserError: the worker cannot be started, or died twice on this pair.
        """
        predicted, gold = predicted.strip(), gold.strip()
        if predicted == gold:
            return True
        if not predicted or not gold or max(len(predicted), len(gold)) > MAX_CHARS:
            return False
        numerically = _equal_numbers(predicted, gold)
        return self._compare(predicted, gold) if numerically is None else numerically

    def close(self) -> None:
        """Stop the worker. The next comparison starts another."""
        if self._worker is not None:
            self._worker.kill()
            self._worker.wait()
            self._worker.stdin.close()
            self._worker.stdout.close()
            self._worker = None

    def _ask(self, predicted: str, gold: str) -> bool:
        question = json.dumps({"predicted": predicted, "gold": gold}).encode() + b"\n"
        for _ in range(2):  # retry once: the worker may have been killed from outside (out of memory)
            worker = self._worker or self._start()
            try:
                os.write(worker.stdin.fileno(), question)
                return _read_line(worker, self.timeout_s)["equal"]
            except TimeoutError:
                self.timeouts += 1
                self.close()
                return False
            except (_WorkerDied, BrokenPipeError):
                code = worker.wait()
                self.close()
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


def _equal_numbers(predicted: str, gold: str) -> bool | None:
    """Compare integers, decimals and a/b exactly; None if that does not settle it.

    Near misses (0.3333333 for 1/3) are for math-verify, which rounds to six decimals.
    """
    if not (_NUMBER.fullmatch(predicted) and _NUMBER.fullmatch(gold)):
        return None
    difference = abs(Fraction(predicted) - Fraction(gold))
    if difference == 0:
        return True
    both_integers = _INTEGER.fullmatch(predicted) and _INTEGER.fullmatch(gold)
    return False if both_integers or difference > Fraction(1, 10_000) else None
