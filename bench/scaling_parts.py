"""What `bench.scaling` measures in processes of their own: times, memory, and ranks with a part of the vocabulary each."""

import gc
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

import torch
import torch.distributed as dist

from mssr_kernels import linear_logprob_entropy, linear_policy_loss

from . import cases, heap, memory
from .inputs import Inputs
from .jobs import CONFIG, Settings, clipped_loss
from .shapes import Shape

Jobs = dict[str, tuple[str, str]]  # the name, provider and task of each
Point = tuple[Shape, Jobs]
OF_A_JOB = ("seconds", "seconds_all", "spoilt", "peak_extra_mib", "error")


def times_of_shapes(shapes: list[Shape], jobs: Jobs, settings: Settings) -> list[dict[str, dict]]:
    """Each job's seconds for each shape; on CUDA its memory, too. One that fails has its error."""
    (found,) = in_processes(1, _times_of_shapes, shapes, jobs, settings)
    return found


def memory_of_points(points: list[Point], settings: Settings) -> list[dict[str, float]]:
    """Peak extra MiB of each job at each point, on a CPU."""
    (found,) = in_processes(1, _memory_of_points, points, settings)
    return found


def on_ranks(ranks: int, shape: Shape, names: tuple[str, ...], settings: Settings) -> dict[str, dict]:
    """Of each of ours: seconds of the slowest rank, a number a repeat, and their median; MiB of the rank that takes most."""
    found, measured = in_processes(ranks, _be_rank, shape, names, settings), {}
    for name in names:
        turns = [max(turn) for turn in zip(*(of_rank[name]["seconds_all"] for of_rank in found))]
        mib = max(of_rank[name]["peak_extra_mib"] for of_rank in found)
        measured[name] = {"seconds": statistics.median(turns), "seconds_all": turns, "peak_extra_mib": mib}
    return measured


def in_processes(count: int, measure: Callable, *arguments) -> list:
    """What `measure(rank, count, folder, *arguments)` returns in each of so many processes.

    Raises:
        RuntimeError: one of them failed; its traceback is on standard error.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="mssr_scaling_") as folder:
        processes = [
            context.Process(target=_write, args=(rank, count, folder, measure, arguments), daemon=True)
            for rank in range(count)
        ]
        try:
            for process in processes:
                process.start()
            while running := [process for process in processes if process.exitcode is None]:
                wait([process.sentinel for process in running])
                if any(process.exitcode for process in processes):
                    raise RuntimeError(f"{measure.__name__.strip('_')}: a process failed; its error is above")
            return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(count)]
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()


def _write(rank: int, count: int, folder: str, measure: Callable, arguments: tuple):
    Path(folder, f"{rank}.json").write_text(json.dumps(measure(rank, count, folder, *arguments)))


def _times_of_shapes(
    rank: int, count: int, folder: str, shapes: list[Shape], jobs: Jobs, settings: Settings
) -> list[dict]:
    heap.keep()
    return [_time_shape(shape, jobs, settings) for shape in shapes]


def _time_shape(shape: Shape, jobs: Jobs, settings: Settings) -> dict[str, dict]:
    tensors, found = cases.make(shape, settings, settings.seed), {}
    failed = {job: why for job in jobs.values() if (why := _why_not(tensors, *job, settings))}
    running = {task: [] for _, task in jobs.values()}
    for provider, task in jobs.values():
        if (provider, task) not in failed:
            running[task].append(provider)
    timed = cases.timed(shape, running, [tensors], settings, lambda _: None)
    for name, (provider, task) in jobs.items():
        of_job = timed[task].get(provider, {"error": failed.get((provider, task))})
        found[name] = {key: of_job[key] for key in OF_A_JOB if key in of_job}
    cases.release(settings.device)
    return found


def _why_not(tensors: Inputs, provider: str, task: str, settings: Settings) -> str | None:
    """The error of a first run, as of eager where its logits do not fit."""
    try:
        cases.run(cases.for_task(tensors, task), provider, task, settings)
    except Exception as error:
        return cases.reason(error)
    finally:
        cases.release(settings.device)
    return None


def _memory_of_points(rank: int, count: int, folder: str, points: list[Point], settings: Settings) -> list[dict]:
    heap.give_back()
    return [
        {name: cases.peak_extra_mib(shape, task, provider, settings) for name, (provider, task) in jobs.items()}
        for shape, jobs in points
    ]


def _be_rank(rank: int, count: int, folder: str, shape: Shape, names: tuple[str, ...], settings: Settings) -> dict:
    """All ranks have the same rows, and each has its part of the vocabulary."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    whole = cases.make(shape, settings, settings.seed)
    tensors = whole._replace(weight=whole.weight.detach().chunk(count)[rank].clone().requires_grad_())
    heap.keep()
    seconds = _seconds(tensors, names, settings)
    heap.give_back()
    heap.trim()
    mib = {name: _peak_extra_mib(tensors, name, settings) for name in names}
    dist.barrier()
    dist.destroy_process_group()
    return {name: {"seconds_all": seconds[name], "peak_extra_mib": mib[name]} for name in names}


def _seconds(tensors: Inputs, names: tuple[str, ...], settings: Settings) -> dict[str, list[float]]:
    found = {name: [] for name in names}
    for turn in range(-1, settings.repeats):  # the first one is the warm-up
        for name in names:
            tensors.hidden.grad = tensors.weight.grad = None
            gc.collect()
            dist.barrier()
            start = time.perf_counter()
            _run(tensors, name, settings)
            if turn >= 0:
                found[name].append(time.perf_counter() - start)
    return found


def _peak_extra_mib(tensors: Inputs, name: str, settings: Settings) -> float:
    _run(tensors, name, settings)
    tensors.hidden.grad = tensors.weight.grad = None
    dist.barrier()
    found = memory.peak_extra_bytes(lambda: _run(tensors, name, settings), "cpu") / memory.MIB
    tensors.hidden.grad = tensors.weight.grad = None
    return found


def _run(tensors: Inputs, name: str, settings: Settings):
    options = dict(workspace_bytes=settings.workspace_bytes, group=dist.group.WORLD)
    if name in ("mssr exact", "mssr sparse"):
        tolerance = settings.vocab_drop_tol if name == "mssr sparse" else None
        linear_policy_loss(*tensors[:5], config=CONFIG, vocab_drop_tol=tolerance, **options).loss.backward()
    elif name == "mssr recompute":
        logp, entropy, _ = linear_logprob_entropy(*tensors[:3], **options)
        clipped_loss(logp, entropy, tensors).backward()
    else:
        with torch.no_grad():
            linear_logprob_entropy(*tensors[:3], **options)
