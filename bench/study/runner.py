"""Runs what a study has planned, several runs at a time; finished runs are not repeated."""

import fcntl
import json
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from bench import machine
from bench.child import Child, Ended
from bench.study.grid import PlannedRun
from bench.study.process import (
    DIVERGED_CODE,
    GRACE_S,
    LOG,
    append_line,
    environment,
    last_line,
    read_lines,
    train_command,
    visible_gpus,
    write_whole,
)
from mssr.config import load_config
from mssr.errors import Interrupted, UserError

FINISHED = "finished.json"
ATTEMPTS = "attempts.jsonl"


@dataclass(frozen=True)
class Outcome:
    """line: why a failed run failed, or how a diverged one ended."""

    run: PlannedRun
    end: Literal["budget", "diverged", "failed"]
    line: str = ""


@dataclass
class Runner:
    """config_file: for all runs. on_end: called in the main thread whenever a run has ended."""

    config_file: Path
    jobs: int
    ranks: int
    on_end: Callable[[Outcome], None]
    _children: dict[str, Child] = field(default_factory=dict)
    _stopping: threading.Event = field(default_factory=threading.Event)

    def run(self, planned: Sequence[PlannedRun], lock: int) -> list[Outcome]:
        """Return the outcomes, in the order in which runs end. lock: of `sole_user`. An exception, such as that of a signal,
        ends all runs first."""
        slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(self.jobs):
            slots.put(slot)
        gpus = visible_gpus(self.ranks) if planned else []
        outcomes = []
        with ThreadPoolExecutor(self.jobs, thread_name_prefix="run") as pool:
            waiting = {pool.submit(self._run_one, run, slots, gpus, lock) for run in planned}
            try:
                while waiting:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    for future in done:
                        outcomes.append(future.result())
                        self.on_end(outcomes[-1])
            except BaseException:
                self._stop_all(pool, waiting)
                raise
        return outcomes

    def _run_one(self, run: PlannedRun, slots: queue.SimpleQueue, gpus: list[str], lock: int) -> Outcome:
        slot = slots.get()
        try:
            if self._stopping.is_set():
                return Outcome(run, "failed", "stopped")
            run.folder.mkdir(parents=True, exist_ok=True)
            command = train_command(self.config_file, run.overrides, self.ranks)
            env = environment(slot, self.ranks, gpus)
            (run.folder / LOG).unlink(missing_ok=True)  # else the reason of an earlier failure would be reported
            child = self._children[run.name] = start(command, env, run.folder / LOG, lock)
            if self._stopping.is_set():  # requested between the check above and the start
                child.stop()
            return _conclude(run, child.wait(), command)
        finally:
            self._children.pop(run.name, None)
            slots.put(slot)

    def _stop_all(self, pool: ThreadPoolExecutor, waiting: Collection[Future]) -> None:
        self._stopping.set()
        pool.shutdown(wait=False, cancel_futures=True)
        self._signal_all(signal.SIGTERM)
        wait([future for future in waiting if not future.cancelled()], timeout=GRACE_S)
        self._signal_all(signal.SIGKILL)

    def _signal_all(self, number: int) -> None:
        for child in list(self._children.values()):
            child.stop(number)


def start(command: list[str], env: dict[str, str], log: Path, lock: int) -> Child:
    """Start a run. lock: a descriptor that it keeps open, so that the study's folder is locked while the run lives."""
    with log.open("ab") as file:
        return Child(
            command, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, pass_fds=(lock,)
        )


def _conclude(run: PlannedRun, ended: Ended, command: list[str]) -> Outcome:
    """Record the cost of the attempt; `finished.json`, which marks a run as finished, is written last."""
    append_line(run.folder / ATTEMPTS, vars(ended))
    line = "" if ended.code == 0 else last_line(run.folder / LOG)
    if ended.code not in (0, DIVERGED_CODE):
        return Outcome(run, "failed", line)
    attempts = read_lines(run.folder / ATTEMPTS)
    outcome = Outcome(run, "diverged" if ended.code else "budget", line)
    finished = {
        "end": outcome.end,
        "line": line,
        "attempts": len(attempts),
        "wall_seconds": round(sum(attempt["wall_seconds"] for attempt in attempts), 2),
        "cpu_seconds": round(sum(attempt["cpu_seconds"] for attempt in attempts), 2),
        "command": command[1:],  # without the interpreter's path
        "machine": machine.facts("cuda" if torch.cuda.is_available() else "cpu"),
    }
    write_whole(run.folder / FINISHED, json.dumps(finished, indent=2) + "\n")
    return outcome


def still_to_run(planned: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Return the runs that are not finished, after checking all, so that nothing starts if one must be removed.

    Raises:
        UserError: a folder holds a run with another configuration, or a damaged record of its attempts.
    """
    for run in planned:
        _refuse_other_run(run)
        read_lines(run.folder / ATTEMPTS)
    return [run for run in planned if not (run.folder / FINISHED).is_file()]


def _refuse_other_run(run: PlannedRun) -> None:
    written = run.folder / "config.yaml"  # the trainer's, before its first step
    if not written.is_file():
        return
    there, here = run.settings(load_config(written)), run.settings(run.config)
    for key, value in here.items():
        if there.get(key) != value:
            raise UserError(
                f"arm {run.arm}, seed {run.seed}: {key} is {value}, the run in {run.folder} had {there.get(key)}; "
                "remove that folder to run it again, or give the arm another name"
            )


@contextmanager
def sole_user(out: Path):
    """Yield a descriptor that locks the study's folder for this process and for those that inherit it.

    Raises:
        UserError: another study uses it, or a run of a killed study; or it has other files.
    """
    if out.is_dir() and any(out.iterdir()) and not (out / ".lock").is_file():
        raise UserError(f"out {out}: holds files, but not of a study; name another folder")
    out.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"out {out}: in use by another study, or by a run that a killed study left behind; wait for it, or end it"
            ) from None
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def signals_raise():
    """Raise Interrupted in the main thread on SIGINT and SIGTERM; later ones are ignored while the runs save and end."""
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers nowhere else
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)

    def stop(number: int, _) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise Interrupted(number, "runs were stopped; the same command continues them")

    previous = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
