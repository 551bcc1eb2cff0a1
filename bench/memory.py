"""Peak extra memory of a job: on CUDA from the allocator, on a CPU the resident set of a process of its own."""

import gc
from collections.abc import Callable
from pathlib import Path

import torch

from . import heap

MIB, GIB = 1 << 20, 1 << 30


def peak_extra_bytes(job: Callable[[], object], device: str) -> int:
    """Return the bytes at the peak of `job` beyond those held before it, results included.

    Run it once before, so that what a first call loads, compiles or caches does not count. On a CPU, call `heap.give_back`
    first.

    Raises:
        RuntimeError: there is no /proc.
    """
    held, peak = peak_bytes(job, device)
    return max(0, peak - held)


def peak_bytes(job: Callable[[], object], device: str) -> tuple[int, int]:
    """Return the bytes held before `job`, and at its peak."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        job()
        torch.cuda.synchronize()
        return before, torch.cuda.max_memory_allocated()
    heap.trim()  # memory freed earlier must not count as held
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current resident set
    job()
    return before, resident_bytes("VmHWM")


def resident_bytes(field: str) -> int:
    """Return VmRSS, the resident set of this process, or VmHWM, its peak."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: memory can only be measured on Linux")
