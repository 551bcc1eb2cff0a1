"""Calls a reward function in worker processes, whatever the function does.

One thread gives jobs to the workers and reads their replies. A job is a call, or a batch of calls. Several jobs wait in a
worker, so that short calls do not wait for this process. A worker that a call hangs or kills is replaced: that call has
failed, and the others are made again.
"""

import json
import os
import pickle
import selectors
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from mssr.errors import UserError, shortened
from mssr.rewards import reward_log
from mssr.rewards.function import Function, Kind
from mssr.rewards.outcome import Failure, Outcome
from mssr.rewards.process import Process
from mssr.rewards.row import Row
from mssr.rewards.worker import Start

CONCURRENT = 256  # calls of an async function
AHEAD_S = 0.05  # work that waits in a worker besides the job that it does
MOST_AHEAD = 64
MOST_SEEN = 1000  # different tracebacks in the log
START_S = 600.0  # to import the function: it may load a model
STARTS = 3  # that fail, one after the other
OTHERS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP")  # signals that a call hardly sends to its own process
MAYBE = {"SIGKILL": ": is the machine out of memory?"}
DUMP_S = 0.1  # for writing where a call hangs
# Besides a call's time: for a worker to begin the next job. Else something that the function left behind keeps it busy.
BETWEEN_S = 60.0


class Reply(Future):
    """The future of a call. A call that was cancelled after its begin may end, but is not made again."""

    def __init__(self, wake_up: Callable[[], None]) -> None:
        super().__init__()
        self.wanted, self._wake_up = True, wake_up

    def cancel(self) -> bool:
        was_wanted, self.wanted = self.wanted, False
        cancelled = super().cancel()
        if was_wanted:
            self._wake_up()
        return cancelled


@dataclass(eq=False, slots=True)
class _Call:
    """alone: in a worker without other calls. lost: how often its worker was lost, and it was not known to be at fault."""

    response: str
    payload: bytes
    future: Reply
    alone: bool = False
    lost: int = 0


class RewardPool:
    """Workers for one function. `submit` may be called from any thread.

    kind: how the function is called. Tracebacks of failures go to the log, each once, and what the function prints.
    """

    def __init__(
        self,
        function: Function,
        *,
        workers: int,
        timeout_s: float,
        memory_gib: float,
        batch_size: int,
        log: Path | None,
    ) -> None:
        """Start the workers, and wait until the first has imported the function.

        workers: an async function gets one. batch_size: most responses in a call of a batched function.

        Raises:
            UserError: the function cannot be imported, or does not take its options.
        """
        self.kind: Kind = "sync"  # until it is imported
        self._images = True
        self._timeout_s = timeout_s
        self._start = Start(function, int(memory_gib * 2**30), timeout_s)
        self._size, self._batch_size, self._log = workers, batch_size, log
        self._waiting: deque[_Call] = deque()
        self._processes: list[Process] = []
        self._failed_starts = self._jobs = 0
        self._mean_s = float("inf")  # of a job
        self._seen: set[str] = set()
        self._closing = False
        self._end: BaseException | None = None  # why no more calls are made
        self._lock = threading.Lock()  # of _end and of _waiting's growth
        self._selector = selectors.PollSelector()  # not select: a trainer with vLLM has more than 1024 open files
        self._wakes, self._wake = socket.socketpair()
        self._wakes.setblocking(False)
        self._wake.setblocking(False)
        self._selector.register(self._wakes, selectors.EVENT_READ)
        self._output, self._printer = reward_log.sink(log)
        self._imported: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="rewards", daemon=True)
        self._thread.start()
        try:
            self._imported.result()
        except BaseException:
            self.close()
            raise

    def submit(self, response: str, row: Row) -> "Future[Outcome]":
        """Call the function. The future's result is an exception only if it is cancelled, the pool is closed, or its workers
        do not start.
        """
        future = Reply(self._wake_up)
        files = row.image_files if self._images else ()
        row_of_worker = [files if field.name == "image_files" else getattr(row, field.name) for field in fields(row)]
        try:
            payload = pickle.dumps((response, row_of_worker), pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            message = f"its row cannot be sent to another process: {type(error).__name__}: {shortened(error)}"
            future.set_result(Outcome(None, Failure("error", message), 0.0))
            return future
        with self._lock:
            if self._end is not None:
                future.set_exception(self._end)
                return future
            self._waiting.append(_Call(response, payload, future))
        self._wake_up()
        return future

    def close(self) -> None:
        """End the workers now. Calls that have not ended raise CancelledError."""
        self._closing = True
        self._wake_up()
        self._thread.join()

    def _wake_up(self) -> None:
        with suppress(OSError):  # full, which is fine, or closed
            self._wake.send(b"!")

    # All below is of the thread.

    def _run(self) -> None:
        try:
            self._processes.append(self._process())
            while not self._closing:
                self._give()
                for key, _ in self._selector.select(self._patience()):
                    if key.data is None:
                        self._wakes.recv(4096)
                    else:
                        self._talk(key.data)
                for process in list(self._processes):
                    self._check(process)
            self._stop(CancelledError("the rewards' processes were closed"))
        except BaseException as error:
            self._stop(error)

    def _stop(self, error: BaseException) -> None:
        with self._lock:
            self._end = error
        for process in self._processes:
            process.kill()
        left = [call for process in self._processes for calls in process.jobs.values() for call in calls]
        for call in (*left, *self._waiting):
            with suppress(InvalidStateError):  # cancelled
                call.future.set_exception(error)
        if not self._imported.done():
            self._imported.set_exception(error)
        for process in self._processes:
            process.ended()
        self._selector.close()
        self._wakes.close()
        self._wake.close()
        os.close(self._output)
        if self._printer is not None:
            with suppress(subprocess.TimeoutExpired):  # a worker that cannot be killed may print
                self._printer.wait(1.0)
            self._printer.kill()
            self._printer.wait()

    def _process(self) -> Process:
        try:
            process = Process(self._start, self._output)
        except OSError as error:
            raise UserError(f"{self._name}: its process cannot be started: {error.strerror}") from error
        self._selector.register(process.channel.end, selectors.EVENT_READ, process)
        return process

    def _give(self) -> None:
        """Give the workers what they have room for."""
        while call := self._first():
            free = [process for process in self._processes if self._has_room(process, call)]
            if not free:
                return
            calls = self._next()
            self._jobs += 1
            process = min(free, key=lambda each: len(each.jobs))
            process.jobs[self._jobs] = calls
            process.alone, process.given = call.alone, time.monotonic()
            with suppress(OSError):  # its end is read soon
                process.channel.send(pickle.dumps((self._jobs, [call.payload for call in calls])))
            self._watch(process)

    def _first(self) -> _Call | None:
        """Return the first call that waits. Those before it that were cancelled are dropped."""
        while self._waiting:
            future = self._waiting[0].future
            if future.wanted and (future.running() or future.set_running_or_notify_cancel()):
                return self._waiting[0]
            self._waiting.popleft()
            if not future.cancelled():
                future.set_exception(CancelledError("it was cancelled before it was made again"))
        return None

    def _has_room(self, process: Process, call: _Call) -> bool:
        if process.ready is None or process.retires:
            return False
        if process.jobs and (call.alone or process.alone):
            return False
        most = CONCURRENT if self.kind == "async" else 1 + min(MOST_AHEAD, int(AHEAD_S / max(self._mean_s, 1e-6)))
        return len(process.jobs) < most

    def _next(self) -> list[_Call]:
        """Take the calls of the next job. There is one."""
        calls = [self._waiting.popleft()]
        size = self._batch_size if self.kind == "batched" and not calls[0].alone else 1
        while len(calls) < size and (call := self._first()) and not call.alone:
            calls.append(self._waiting.popleft())
        return calls

    def _watch(self, process: Process) -> None:
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if process.channel.unsent else 0)
        if self._selector.get_key(process.channel.end).events != events:
            self._selector.modify(process.channel.end, events, process)

    def _talk(self, process: Process) -> None:
        """Read replies and send what did not fit into the socket before."""
        try:
            process.channel.flush()
            self._watch(process)
            messages = process.channel.receive()
        except (EOFError, OSError):
            return self._lose(process, "died")
        for message in messages:
            said = json.loads(message)
            if process.ready is None:
                self._has_started(process, said)
            else:
                self._settle(process, *said)

    def _has_started(self, process: Process, said: dict) -> None:
        if "refused" in said:
            if said["traceback"]:
                self._write(f"{said['refused']}\n{said['traceback']}")
            raise UserError(said["refused"])
        process.ready = said
        self._failed_starts = 0
        if not self._imported.done():
            self.kind, self._images, self._timeout_s = said["kind"], said["images"], said["timeout_s"]
            more = 0 if self.kind == "async" else self._size - 1
            self._processes += [self._process() for _ in range(more)]
            self._imported.set_result(None)

    def _settle(self, process: Process, number: int, seconds: float, results: list | None, failed: list | None) -> None:
        """Resolve the calls of a job that a worker has answered."""
        calls = process.jobs.pop(number)
        self._mean_s = seconds if self._mean_s == float("inf") else 0.9 * self._mean_s + 0.1 * seconds
        failures = [Failure(*failed)] if failed else [Failure(*wrong) for _, wrong in results if wrong]
        process.retires |= any(failure.kind == "memory" for failure in failures)
        if results is None:
            return self._blame(calls, failures[0], seconds)
        for call, (parts, wrong) in zip(calls, results):
            self._resolve(call, Outcome(parts, Failure(*wrong) if wrong else None, seconds))

    def _blame(self, calls: list[_Call], failure: Failure, seconds: float) -> None:
        """Fail the call; of a batch, make each call alone."""
        if len(calls) == 1:
            return self._resolve(calls[0], Outcome(None, failure, seconds))
        self._note(failure, f"a call with {len(calls)} responses, each of which is now called alone")
        for call in calls:
            call.alone = True
        self._waiting.extendleft(reversed(calls))

    def _resolve(self, call: _Call, outcome: Outcome) -> None:
        if outcome.failure is not None:
            self._note(outcome.failure, f"the call for the response {shortened(call.response)!r}")
        call.future.set_result(outcome)

    def _patience(self) -> float:
        """Return for how many seconds nothing can be late."""
        now, soonest = time.monotonic(), 60.0
        for process in self._processes:
            if process.ready is None:
                soonest = min(soonest, process.begun + START_S - now)
            elif process.jobs:
                left_s = self._limit(process, *process.pulse.read()) - now
                soonest = min(soonest, self._timeout_s, max(left_s, DUMP_S / 2))  # the next job may begin at once
        return max(soonest, 0.0)

    def _limit(self, process: Process, job: int, since: float) -> float:
        """Return when a worker is late that has had this pulse."""
        if job or self.kind == "async":  # whose event loop has a pulse between calls, too
            return since + self._timeout_s
        return max(since, process.given) + self._timeout_s + BETWEEN_S

    def _check(self, process: Process) -> None:
        """Replace a worker whose call is late."""
        now = time.monotonic()
        if process.ready is None:
            if now > process.begun + START_S:
                raise UserError(f"{self._name}: importing it takes more than {START_S:g} s")
            return
        job, since = process.pulse.read()
        late_s = now - self._limit(process, job, since)
        if not process.jobs or late_s < 0:
            return
        if late_s < DUMP_S:
            return process.dump(job)
        self._talk(process)  # this thread may have been late
        if process in self._processes and process.pulse.read() == (job, since):
            self._lose(process, "timeout")

    def _lose(self, process: Process, why: Literal["timeout", "died"]) -> None:
        """Replace a worker that hangs or has ended, and make the calls again that are not at fault."""
        job, since = process.pulse.read()
        seconds = time.monotonic() - since
        process.kill()
        self._selector.unregister(process.channel.end)
        ended = process.ended()
        self._processes.remove(process)
        if process.ready is None:
            self._failed_starts += 1
            if self._failed_starts == STARTS:
                raise UserError(
                    f"{self._name}: its process ended {STARTS} times while it was importing the function (the last time with "
                    f"{ended}); does its file run by itself?"
                )
        jobs, guilty = process.jobs, None
        if not process.retires:
            guilty = jobs.get(job) or (next(iter(jobs.values())) if len(jobs) == 1 else None)
        if guilty and not guilty[0].lost and (not job or (why == "died" and ended in OTHERS)):
            guilty = None  # not begun; the system was out of memory, or somebody ends processes: once more, alone
        if guilty:
            jobs = {number: calls for number, calls in jobs.items() if calls is not guilty}
            message = (
                f"took more than {self._timeout_s:g} s"
                if why == "timeout"
                else f"ended its process ({ended}{MAYBE.get(ended, '')})"
            )
            self._blame(guilty, Failure(why, message, process.hung_at if why == "timeout" else ""), seconds)
        again = [call for calls in jobs.values() for call in calls]
        known = guilty or process.retires
        begun = again if self.kind == "async" else [] if known else jobs.get(job, again)
        for call in begun:
            call.lost += 1
            call.alone = call.lost > 1 or not known
        self._waiting.extendleft(reversed(again))
        self._processes.append(self._process())

    def _note(self, failure: Failure, what: str) -> None:
        """Write the failure to the log; a traceback only once."""
        key = failure.traceback or failure.message
        if key in self._seen or len(self._seen) > MOST_SEEN:
            return
        self._seen.add(key)
        self._write(
            f"{self._start.function.label}: {what} failed ({failure.kind}): {failure.message}\n{failure.traceback}"
        )

    def _write(self, text: str) -> None:
        if self._log is not None:
            reward_log.append(self._log, f"{text.rstrip()}\n".encode(errors="backslashreplace"), 2 * reward_log.LIMIT)

    @property
    def _name(self) -> str:
        return f"reward.function {self._start.function.where}"
