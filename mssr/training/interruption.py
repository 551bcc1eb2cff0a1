"""Handles SIGTERM and SIGUSR1, which schedulers send some time before they kill a job."""

import os
import signal
import threading
import time

import torch

from mssr.distributed import World

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
REPEATED_S = 10.0


class Interruptions:
    """Context manager that remembers a signal until the loop asks for it.

    A second signal acts as without it, except within REPEATED_S: a signal to a whole process group arrives twice if the
    launcher in the group forwards it.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._number, self._since = 0, 0.0
        self._previous: dict[int, object] = {}

    def asked(self) -> int:
        """Return the number of the signal that any rank received, or 0. Collective."""
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
