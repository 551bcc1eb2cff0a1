"""Reward functions under test: the response says what they do."""

import asyncio
import ctypes
import math
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from fractions import Fraction

import neighbour

from mssr.errors import UserError

kept = []
arrived, all_here = 0, asyncio.Event()


def sync(response, row, plus=0.0):
    match response.split():
        case ["hang"]:
            time.sleep(600)
        case ["loop"]:
            while True:
                pass
        case ["raise"]:
            raise ValueError("not\nso")
        case ["explain"]:
            raise UserError("the answer is no number")
        case ["evil"]:
            raise Evil
        case ["exit"]:
            sys.exit(3)
        case ["interrupt"]:
            raise KeyboardInterrupt
        case ["end"]:
            os._exit(3)
        case ["segfault"]:
            ctypes.string_at(0)
        case ["recursion"]:
            return sync(response, row)
        case ["memory"]:
            return len(bytearray(3 << 30))
        case ["leak"]:
            while True:
                kept.append(bytes(1 << 26))  # not touched, so no time is lost
        case ["kill", marker]:
            if not os.path.exists(marker):
                open(marker, "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
        case ["killed"]:
            os.kill(os.getpid(), signal.SIGKILL)
        case ["fork"]:
            child = os.fork()
            if child:
                os.waitpid(child, 0)
        case ["fork", "hang"]:
            child = os.fork()
            if child:
                os.waitpid(child, 0)
                time.sleep(600)
        case ["busy", marker]:
            if not os.path.exists(marker):
                open(marker, "w").close()
                threading.Thread(target=_keeps_the_interpreter, daemon=True).start()
        case ["return", "numpy"]:
            return {"accuracy": _numpy().float32(0.5), "short": _numpy().int64(-1)}
        case ["return", what]:
            return RETURNED[what]
        case ["neighbour"]:
            return neighbour.VALUE
        case ["answer"]:
            return float(row.answer)
        case ["torch"]:
            return "torch" in sys.modules
        case ["pid"]:
            return os.getpid()
        case ["session"]:
            return os.getsid(0)
        case ["ground"]:
            return (os.environ["SYMPY_GROUND_TYPES"], os.environ["MPMATH_NOGMPY"]) == ("python", "1")
        case ["ask"]:
            return input()
        case ["row"]:
            assert (row.problem, row.answer, row.prompt, row.tokens) == ("How many?", "3", "user: How many?", 7)
            assert row.max_tokens == 9 and row.truncated and row["level"] == [1, {"a": "b"}]
            return {"red": row.images[0].getpixel((0, 0))[0], "size": row.images[0].width}
        case ["wait", path]:
            _wait_for(path)
        case ["nothing", path]:
            open(path, "w").close()
    return 1 + plus


def _keeps_the_interpreter():
    time.sleep(0.01)  # until the call has ended
    ctypes.PyDLL(None).sleep(600)


def _numpy():
    import numpy

    return numpy


class Evil(Exception):
    def __str__(self):
        raise RuntimeError


RETURNED = {
    "true": True,
    "fraction": Fraction(1, 2),
    "nan": math.nan,
    "inf": {"accuracy": 1.0, "short": -math.inf},
    "none": None,
    "text": "1",
    "complex": 1j,
    "list": [1.0],
    "empty": {},
    "key": {1: 1.0},
    "nested": {"accuracy": {"a": 1}},
}


async def concurrent(response, row):
    global arrived
    match response.split():
        case ["hang"]:
            await asyncio.sleep(600)
        case ["stubborn"]:
            while True:
                with suppress(asyncio.CancelledError):
                    await asyncio.sleep(600)
        case ["block"]:
            await asyncio.sleep(0)
            time.sleep(600)
        case ["block", "below"]:
            await asyncio.gather(blocks())
        case ["exit"]:
            await asyncio.sleep(0)
            sys.exit(3)
        case ["exit", "below"]:
            await asyncio.gather(exits())
        case ["end"]:
            os._exit(3)
        case ["all", number]:
            arrived += 1
            if arrived == int(number):
                all_here.set()
            await all_here.wait()
        case ["waits"]:
            await asyncio.sleep(0.1)
    return 1.0


async def blocks():
    time.sleep(600)


async def exits():
    sys.exit(3)


def batched(responses, rows):
    assert [row.answer for row in rows] == responses
    if rows[0].columns:
        _wait_for(rows[0]["go"])
    if "hang" in responses:
        time.sleep(600)
    if "raise" in responses:
        raise ValueError("not so")
    if "end" in responses:
        os._exit(3)
    if "short" in responses:
        return [1.0] * (len(responses) - 1)
    if "text" in responses:
        return "1" * len(responses)
    return [float("nan") if response == "nan" else {"size": len(responses)} for response in responses]


async def async_batched(responses, rows):
    await asyncio.sleep(0)
    return _numpy().full(len(responses), len(responses))


def prints(response, row):
    for _ in range(30):
        print("p" * 100_000)
        print("e" * 100, file=sys.stderr)
        ctypes.CDLL(None).puts(b"c" * 10_000)
    return 1


def starts_a_child(response, row, pids):
    child = subprocess.Popen(["setsid", "sleep", "600"])
    with open(pids, "w") as file:
        file.write(f"{os.getpid()} {child.pid}\n")
    if response == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        threading.Event().wait()
    if response == "end":
        _wait_for(f"{pids}_opened")
        os._exit(3)
    return 1


def computes_20_ms(response, row):
    until = time.thread_time() + 0.02
    while time.thread_time() < until:
        pass
    return 1


async def waits_50_ms(response, row):
    await asyncio.sleep(0.05)
    return 1


def _wait_for(path):
    while not os.path.exists(path):
        time.sleep(0.005)


def only_response(response):
    return 1


class NoFunction:
    pass
