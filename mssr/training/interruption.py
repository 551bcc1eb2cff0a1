"""SIGTERM and SIGUSR1: what a scheduler sends some time before it kills a job."""

import os
import signal
import threading
import time

import torch

from mssr.distributed import World

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
REPEATED_S = 10.0


class Interruptions:
    """While entered, a signal is remembered until the loop asks. A later one acts as it always did, but not one within
    REPEATED_S: whoever signals a whole group of processes, with a launcher in it that hands signals on, sends two.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._number, self._since = 0, 0.0
        self._previous: dict[int, object] = {}

    def asked(self) -> int:
        """The number of the signal that any rank received, on every rank; 0: none."""
        return int(self._world.max(torch.tensor(self._number)))

    def __enter__(self) -> "Interruptions":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._previous = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        self._restore()

    def _remember(self, number: int, _) -> None:
        if not self._number:
            self._number, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > REPEATED_S:
            self._restore()
            os.kill(os.getpid(), number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
