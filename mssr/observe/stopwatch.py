"""Where a step's seconds go."""

import time
from collections import defaultdict
from contextlib import contextmanager

import torch


class Stopwatch:
    """Seconds spent in each named phase of a step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._started = self._now()
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str):
        start = self._now()
        yield
        self.seconds[phase] += self._now() - start

    @property
    def total(self) -> float:
        return self._now() - self._started

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
