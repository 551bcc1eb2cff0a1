"""What measuring a shape will take: memory from the shape alone, before anything is allocated; time from measured roofs."""

import torch

from . import accuracy, work
from .jobs import Settings
from .providers import PROVIDERS
from .roofs import share
from .shapes import Shape

LIBRARIES = 1 << 30  # bytes of a process with torch and the peers
# Bytes per logit at the peak of eager, which is always measured: three float32 tensors. In 16 bits on a CPU freed blocks,
# which the process keeps, do not fit the next tensor of another dtype.
LOGIT = {"float32": 12, "bfloat16": 20, "float16": 20}
CHUNKS = 5  # tensors of float64 logits at a time, in accuracy.exact
OVER_ROOF = 1.4  # time over roof time, of most providers
MORE_RUNS = {"cpu": 4, "cuda": 2}  # besides warm-up and repeats: two for the errors, and on a CPU two for the memory
START = {"cpu": 10.0, "cuda": 20.0}  # seconds until a process measures
EXACT = {"cpu": 60.0, "cuda": 5.0}  # seconds per objective for accuracy.MOST_FLOPS


def peak_bytes(shape: Shape, settings: Settings) -> int:
    """Return the peak of the process that measures a shape; on CUDA without providers, since those that need more fail."""
    rows = accuracy.rows_of(shape.n, shape.d, shape.v, settings.device)
    job = job_bytes(shape) if settings.device == "cpu" else 0
    return LIBRARIES + settings.input_sets * inputs_bytes(shape) + checked_bytes(shape, rows, job)


def tolerance_bytes(shape: Shape) -> int:
    """Return the peak of `bench.tolerance`, which needs eager, and float64 of all rows."""
    return LIBRARIES + inputs_bytes(shape) + checked_bytes(shape, shape.n, job_bytes(shape))


def checked_bytes(shape: Shape, rows: int, job: int) -> int:
    """Return the peak besides the inputs of a job that is compared with float64. rows: of float64. job: its own bytes."""
    head = shape.v * shape.d
    held = 8 * head if rows == shape.n else 0
    exact = 8 * head + CHUNKS * min(accuracy.CHUNK_BYTES, 8 * rows * shape.v)
    errors = 20 * head if rows == shape.n else 0  # of the weight's gradient: it, and two of its size in float64
    return held + max(exact, errors, job)


def memory_process_bytes(shape: Shape) -> int:
    """Return the peak of a process that measures one provider's memory on a CPU."""
    return LIBRARIES + inputs_bytes(shape) + job_bytes(shape)


def inputs_bytes(shape: Shape) -> int:
    return getattr(torch, shape.dtype).itemsize * shape.d * (shape.n + shape.v)


def job_bytes(shape: Shape) -> int:
    """Return what eager takes: logits and both gradients."""
    return LOGIT[shape.dtype] * shape.n * shape.v + inputs_bytes(shape)


def most_tokens(shape: Shape, settings: Settings, have: int) -> int:
    """Return the largest power of two of tokens that fits into `have` bytes; 0: none does."""
    n = 1 << shape.n.bit_length()
    while n and peak_bytes(shape._replace(n=n), settings) > have:
        n //= 2
    return n


def seconds(shape: Shape, tasks: list[str], names: list[str], settings: Settings, roofs: dict) -> float:
    """Return the time to measure a shape, without compilation."""
    device, here = settings.device, [PROVIDERS[name] for name in names]
    here = [provider for provider in here if provider.why_not(device) is None]
    runs = settings.input_sets + settings.repeats + MORE_RUNS[device]
    of_runs = sum(
        OVER_ROOF * runs * share(*of_job(provider, task, shape), shape.dtype, roofs)
        for provider in here
        for task in tasks
        if task in provider.tasks
    )
    rows = accuracy.rows_of(shape.n, shape.d, shape.v, device)
    exact = EXACT[device] * 8.0 * rows * shape.d * shape.v / accuracy.MOST_FLOPS[device]
    processes = 1 + (len(here) / 2 if device == "cpu" else 0)
    return of_runs + exact * len({provider.objective for provider in here}) + START[device] * processes


def of_job(provider, task: str, shape: Shape) -> tuple[float, float, float]:
    """Return FLOPs, bytes, and one second: the share of the roof in one second is the roof's time."""
    return work.flops(provider, task, shape), work.bytes_moved(provider, task, shape), 1.0
