"""A process that calls one reward function, for `mssr.rewards.process`; nothing of torch is imported here.

The first message is `Start`, pickled; the answer says how the function is called, or why it cannot be imported. Then
messages are jobs: (number, payloads), each payload a pickled (response, row). A sync function gets one payload, a batched
one several, an async one is called for the next job before the last has ended. Replies are JSON:

    [number, seconds, [[parts, null] | [null, [kind, message, traceback]], ...]]      one per payload

`null` instead of that list: the whole batch failed; then [kind, message, traceback] follows.
"""

import asyncio
import contextlib
import faulthandler
import json
import math
import numbers
import os
import pickle
import resource
import signal
import socket
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mssr.errors import UserError, shortened
from mssr.rewards.channel import Channel
from mssr.rewards.function import Function, described, is_async, load
from mssr.rewards.pulse import Pulse
from mssr.rewards.row import Row

MAX_TRACEBACK = 8_000  # characters
BEAT_S = 0.2  # an event loop says that often that it is alive

Failed = tuple[str, str, str]  # kind, message, traceback
Result = tuple[dict[str, float] | None, Failed | None]


@dataclass(frozen=True)
class Start:
    """memory: bytes that the function may use besides what it has after its import. timeout_s: if it has no other."""

    function: Function
    memory: int
    timeout_s: float


class Worker:
    def __init__(self, channel: Channel, pulse: Pulse, start: Start) -> None:
        self.channel, self.pulse = channel, pulse
        self.label = start.function.label
        self.function = load(start.function)
        self.timeout_s = start.function.timeout_s or self.function.timeout_s or start.timeout_s
        self.pid = os.getpid()
        _limit_memory(start.memory)
        pulse.begin(0)  # else it would look late before its first job
        os.register_at_fork(after_in_child=pulse.detach)

    def serve(self) -> None:
        """Answer jobs until the trainer closes the socket."""
        if self.function.kind == "async":
            return asyncio.run(self._serve_async())
        answer, call = self._batch if self.function.kind == "batched" else self._single, self.function.call
        with asyncio.Runner() as runner:
            if is_async(call):  # a batched one
                call = lambda *job, **options: runner.run(self.function.call(*job, **options))  # noqa: E731
            while True:
                for message in self.channel.receive(wait=True):
                    number, payloads = pickle.loads(message)
                    self.pulse.begin(number)
                    started = time.perf_counter()
                    results, failed = answer(call, payloads)
                    seconds = time.perf_counter() - started
                    self.pulse.begin(0)
                    self._reply(number, seconds, results, failed)

    def _single(self, call: Callable, payloads: list[bytes]) -> tuple[list[Result], None]:
        try:
            response, row = _read(payloads[0])
            return [self._reduced(call(response, row, **self.function.options))], None
        except BaseException as error:
            return [(None, self._failed(error))], None

    def _batch(self, call: Callable, payloads: list[bytes]) -> tuple[list[Result] | None, Failed | None]:
        try:
            responses, rows = zip(*map(_read, payloads))
            found = call(list(responses), list(rows), **self.function.options)
            if isinstance(found, str | bytes | Mapping) or not hasattr(found, "__len__"):
                return None, ("result", f"returned {_what(found)}, not a list of {len(responses)} rewards", "")
            if len(found) != len(responses):
                counts = f"{len(found)} results for {len(responses)} response{'s' * (len(responses) > 1)}"
                return None, ("result", f"returned {counts}", "")
            return [self._reduced(one) for one in found], None
        except BaseException as error:
            return None, self._failed(error)

    async def _serve_async(self) -> None:
        loop, tasks, ended = asyncio.get_running_loop(), set(), asyncio.get_running_loop().create_future()

        def beat() -> None:
            self.pulse.begin(0)
            loop.call_later(BEAT_S, beat)

        def read() -> None:
            try:
                messages = self.channel.receive()
            except EOFError as error:
                return None if ended.done() else ended.set_exception(error)
            for message in messages:
                task = loop.create_task(answer(*pickle.loads(message)))
                tasks.add(task)
                task.add_done_callback(done)

        def done(task: asyncio.Task) -> None:
            tasks.discard(task)
            if not task.cancelled() and task.exception() is not None and not ended.done():
                ended.set_exception(task.exception())

        async def answer(number: int, payloads: list[bytes]) -> None:
            started = time.perf_counter()
            result = await self._concurrent(number, payloads[0])
            self._reply(number, time.perf_counter() - started, [result], None)

        beat()
        loop.add_reader(self.channel.end, read)
        await ended

    async def _concurrent(self, number: int, payload: bytes) -> Result:
        calls = []

        async def call() -> Result:
            try:
                self.pulse.begin(number)
                response, row = _read(payload)
                calls.append(self.function.call(response, row, **self.function.options))
                return self._reduced(await _noted(calls[0], number, self.pulse))
            except BaseException as error:
                return None, self._failed(error)
            finally:
                self.pulse.begin(0)

        task = asyncio.get_running_loop().create_task(call())
        done, _ = await asyncio.wait({task}, timeout=self.timeout_s)
        if done:
            return task.result()
        waits = traceback.StackSummary.extract(_awaited(calls[0])).format() if calls else []
        task.cancel()
        return None, (
            "timeout",
            f"took more than {self.timeout_s:g} s",
            "".join(["It waited here:\n", *waits])[:MAX_TRACEBACK],
        )

    def _reduced(self, found: Any) -> Result:
        """Return what the function returned as plain numbers, or what is wrong with it."""
        parts = found if isinstance(found, Mapping) else {self.label: found}
        if not parts:
            return None, ("result", "returned a dict without parts", "")
        plain = {}
        for name, value in parts.items():
            if not isinstance(name, str):
                return None, ("result", f"returned a dict with the key {_what(name)}; names of parts are text", "")
            place = f" as {name!r}" if isinstance(found, Mapping) else ""
            plain[name] = number = _number(value)
            if number is None:
                return None, ("result", f"returned {_what(value)}{place}, not a number", "")
            if not math.isfinite(number):
                return None, ("result", f"returned {number}{place}", "")
        return plain, None

    def _failed(self, error: BaseException) -> Failed:
        """Return the exception as text: without this file's frames, and of an error that explains itself the line alone."""
        kind = "error"
        if isinstance(error, MemoryError):
            _limit_memory(None)  # the reply needs some
        message = described(error, getattr(getattr(self.function.call, "__code__", None), "co_filename", None))
        if isinstance(error, MemoryError) or "can't allocate memory" in message:  # torch's
            kind = "memory"
        if isinstance(error, UserError):
            return kind, message, ""
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
            trace = trace.tb_next
        return kind, message, "".join(traceback.format_exception(type(error), error, trace))[-MAX_TRACEBACK:]

    def _reply(self, number: int, seconds: float, results: Sequence[Result] | None, failed: Failed | None) -> None:
        if os.getpid() != self.pid:  # the function has forked, and this is the child
            os._exit(0)
        self.channel.send_all(json.dumps([number, seconds, results, failed]).encode())
        if any(each and each[0] == "memory" for each in (failed, *(one[1] for one in results or ()))):
            os._exit(0)  # another process takes over: what the function keeps may be too much for the next call, too


@types.coroutine
def _noted(coroutine: types.CoroutineType, number: int, pulse: Pulse):
    """Run the coroutine; the pulse has its number whenever it keeps the event loop busy."""
    step, argument = coroutine.send, None
    while True:
        pulse.begin(number)
        try:
            waits_for = step(argument)
        except StopIteration as end:
            return end.value
        finally:
            pulse.begin(0)
        try:
            step, argument = coroutine.send, (yield waits_for)
        except BaseException as error:
            step, argument = coroutine.throw, error


def _awaited(coroutine: Any) -> Iterator[tuple[types.FrameType, int]]:
    """Yield the frames of a coroutine that waits, and of those that it waits for, with their lines."""
    while frame := getattr(coroutine, "cr_frame", None):
        yield frame, frame.f_lineno
        coroutine = coroutine.cr_await


def _read(payload: bytes) -> tuple[str, Row]:
    response, row = pickle.loads(payload)
    return response, Row(*row)


def _number(value: Any) -> float | None:
    if isinstance(value, str | bytes | bytearray) or (
        isinstance(value, numbers.Complex) and not isinstance(value, numbers.Real)
    ):
        return None
    try:
        return float(value)
    except Exception:
        return None


def _what(value: Any) -> str:
    if value is None:
        return "None"
    try:
        shown = shortened(repr(value), 80)
    except Exception:
        return type(value).__name__
    return f"{type(value).__name__} {shown}"


def _limit_memory(more: int | None) -> None:
    """Limit what the process may allocate. Not its address space, of which CUDA reserves a lot that it does not use."""
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    limit = hard
    if more is not None and (status := Path("/proc/self/status")).exists():
        used = next(int(line.split()[1]) << 10 for line in status.open() if line.startswith("VmData:"))
        limit = used + more if hard == resource.RLIM_INFINITY else min(used + more, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def main(end: int, pulse: int, dump: int) -> None:
    """Serve one pool. end: of the socket pair. pulse, dump: files, for `Pulse` and for where a call hangs."""
    sys.argv = ["reward"]
    for descriptor in (end, pulse, dump):
        os.set_inheritable(descriptor, False)
    faulthandler.register(signal.SIGUSR1, file=dump, all_threads=False)
    signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C is for the trainer
    channel = Channel(socket.socket(fileno=end))
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the trainer has closed the pool
        while not (messages := channel.receive(wait=True)):
            pass
        try:
            worker = Worker(channel, Pulse(pulse), pickle.loads(messages[0]))
        except UserError as error:
            cause = error.__cause__
            text = "".join(traceback.format_exception(cause)) if cause is not None else ""
            channel.send_all(json.dumps({"refused": str(error), "traceback": text}).encode())
            return
        function = worker.function
        ready = {"kind": function.kind, "images": function.images, "timeout_s": worker.timeout_s, "pid": worker.pid}
        worker.pulse.begin(0)  # the trainer looks at it from now on
        channel.send_all(json.dumps(ready).encode())
        worker.serve()
    os._exit(0)  # a thread of the function's may still run
