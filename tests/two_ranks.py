"""Two real gloo ranks in separate processes. A rank that hangs or dies fails the call, not the session."""

import atexit
import gc
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import wait

import torch
from forked import forkserver, take_environment

from mssr.distributed import start_world

START_TIMEOUT = 300  # seconds to import everything
TIMEOUT = 60  # seconds per call; on busy cores a call takes a few


class Ranks:
    """`ranks(function, ...)` runs `function(world, ...)` on every rank and returns the results in rank order."""

    def __init__(self, size: int = 2) -> None:
        self.size = size
        self._processes: list = []
        self._pipes: list = []

    def __call__(self, function: Callable, *args, timeout: float = TIMEOUT, **kwargs) -> list:
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((function, args, kwargs)))
        return self._results(function.__name__, timeout)

    def _results(self, what: str, timeout: float) -> list:
        results, waiting, deadline = {}, list(self._pipes), time.monotonic() + timeout
        while waiting:
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                self.stop()
                stuck = [rank for rank in range(self.size) if rank not in results]
                raise TimeoutError(f"{what}: ranks {stuck} hang after {timeout} s")
            for pipe in ready:
                rank = self._pipes.index(pipe)
                try:
                    value, error = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    value, error = None, "the process died"
                if error:
                    self.stop()
                    raise RuntimeError(f"{what}, rank {rank}: {error}")
                results[rank] = value
                waiting.remove(pipe)
        return [results[rank] for rank in range(self.size)]

    def _start(self) -> None:
        context = forkserver()
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        for rank in range(self.size):
            pipe, child = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.size, port, child, dict(os.environ)), daemon=True)
            process.start()
            child.close()
            self._processes.append(process)
            self._pipes.append(pipe)
        atexit.register(self.stop)
        self._results("start", START_TIMEOUT)

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []


@cache
def two_ranks() -> Ranks:
    return Ranks(2)


def _serve(rank: int, size: int, port: int, pipe, environment: dict[str, str]) -> None:
    take_environment(environment)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu",
    )  # fmt: skip
    torch.set_num_threads(1)
    gc.freeze()  # as in conftest.py
    world = start_world("cpu")
    pipe.send_bytes(pickle.dumps(("ready", None)))
    while True:
        try:
            function, args, kwargs = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            result, error = function(world, *args, **kwargs), None
        except BaseException:
            result, error = None, traceback.format_exc()
        pipe.send_bytes(pickle.dumps((result, error)))
