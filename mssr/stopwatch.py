"""Seconds and memory of each phase of a step."""

import time
from collections import defaultdict
from contextlib import contextmanager

import psutil
import torch

GIB = 2**30


class Stopwatch:
    """Measures seconds and memory of each named phase of a step.

    memory: metrics in GiB, the maximum over a phase's visits. On a GPU, `memory/<phase>_gib` is the peak of torch's tensors,
    `memory/<phase>_reserved_gib` the peak of torch's allocator, and `memory/device_used_gib` the memory in use by all
    processes and allocators (vLLM has its own) at a phase's end. On a CPU, `memory/<phase>_rss_gib` is the process's
    resident memory at the phase's end.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._started = self._now()
        self.seconds: dict[str, float] = defaultdict(float)
        self.memory: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str):
        start = self._now()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        yield
        self.seconds[phase] += self._now() - start
        self._look_at_memory(phase)

    @property
    def total(self) -> float:
        return self._now() - self._started

    def _look_at_memory(self, phase: str) -> None:
        if self._device.type == "cuda":
            self._keep_most(f"{phase}_gib", torch.cuda.max_memory_allocated(self._device))
            self._keep_most(f"{phase}_reserved_gib", torch.cuda.max_memory_reserved(self._device))
            free, total = torch.cuda.mem_get_info(self._device)
            self._keep_most("device_used_gib", total - free)
        else:
            self._keep_most(f"{phase}_rss_gib", psutil.Process().memory_info().rss)

    def _keep_most(self, name: str, size: int) -> None:
        name = f"memory/{name}"
        self.memory[name] = max(self.memory.get(name, 0.0), size / GIB)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
