"""The cases of one shape, measured in this process: every provider is checked against float64, then all take turns."""

import gc
import statistics
from collections.abc import Callable

import torch

from . import accuracy, inputs, memory, steal, work
from .inputs import Inputs
from .jobs import Rows, Settings
from .providers import PROVIDERS
from .report import EAGER, ratios
from .roofs import seconds_of
from .shapes import Shape

# (task, provider) -> {"work"} and its figures, or "skipped", why it cannot run here, or "error".
Results = dict[tuple[str, str], dict]


def measure(
    shape: Shape,
    tasks: list[str],
    names: list[str],
    settings: Settings,
    tell: Callable[[str], None] = lambda name: None,
) -> list[dict]:
    """Return a case per task; `python -m bench.kernels --help` says what is in it. Memory is measured here only on CUDA.

    tell: called with a provider's name before it runs, and with "" afterwards. The result of a provider that raises is its
    error; the caller checks whether the process survived.
    """
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # by default it would silently continue in eager
    sets = [make(shape, settings, settings.seed + index) for index in range(settings.input_sets)]
    results: Results = {
        (task, name): {"work": PROVIDERS[name].work}
        for task in tasks
        for name in names
        if task in PROVIDERS[name].tasks
    }
    check(shape, results, sets[0], settings, tell)
    measure_times(shape, results, sets, settings, tell)
    return [
        {**shape._asdict(), "task": task, "mean_entropy": sets[0].mean_entropy, "providers": of_task(results, task)}
        for task in tasks
    ]


def of_task(results: Results, task: str) -> dict[str, dict]:
    """Return the results of a task, by provider."""
    return {name: found for (of, name), found in results.items() if of == task}


def make(shape: Shape, settings: Settings, seed: int) -> Inputs:
    return inputs.make(shape.n, shape.d, shape.v, getattr(torch, shape.dtype), settings.device, shape.rows, seed)


def for_task(tensors: Inputs, task: str) -> Inputs:
    """Return tensors on the same memory, which require the gradients of the task and have none yet."""
    hidden = tensors.hidden.detach().requires_grad_(task != "forward")
    return tensors._replace(hidden=hidden, weight=tensors.weight.detach().requires_grad_(task == "loss"))


def run(tensors: Inputs, name: str, task: str, settings: Settings):
    """Do the job once. tensors: of `for_task`."""
    provider = PROVIDERS[name]
    if task == "forward":
        with torch.no_grad():
            (provider.rows or provider.loss)(tensors, settings)
    else:
        provider.loss(tensors, settings).backward()


def check(shape: Shape, results: Results, tensors: Inputs, settings: Settings, tell: Callable[[str], None]) -> None:
    """Add the errors against float64, or why there are none; also warms up and compiles."""
    rows = accuracy.rows_of(shape.n, shape.d, shape.v, settings.device)
    for objective in dict.fromkeys(PROVIDERS[name].objective for _, name in results):
        exact = accuracy.exact(tensors, objective, rows)
        for (task, name), found in results.items():
            if PROVIDERS[name].objective == objective:
                tell(name)
                if why := PROVIDERS[name].why_not(settings.device):
                    found["skipped"] = why
                else:
                    try:
                        found["errors"] = errors_of(for_task(tensors, task), name, task, exact, settings)
                    except Exception as error:
                        lines = str(error).strip().splitlines() or [""]
                        found["error"] = f"{type(error).__name__}: {lines[0][:200]}"
                    release(settings.device)  # raises here if the provider has broken the device
                tell("")


def errors_of(tensors: Inputs, name: str, task: str, exact: accuracy.Exact, settings: Settings) -> dict[str, float]:
    provider = PROVIDERS[name]
    run(tensors, name, task, settings)
    d_weight = tensors.weight.grad if task == "loss" else None  # some providers compute it unasked
    with torch.set_grad_enabled(task != "forward"):
        rows = provider.rows(tensors, settings) if provider.rows else Rows(None, None)
    return accuracy.errors(exact, *rows, tensors.hidden.grad, d_weight)


def measure_times(
    shape: Shape, results: Results, sets: list[Inputs], settings: Settings, tell: Callable[[str], None]
) -> None:
    """Add the figures of all providers that can run.

    All providers run once per turn, and a ratio is the median of the ratios within turns, so that a slow machine slows all of
    them equally. Each turn takes the next set of inputs and another order, so that no provider always follows the same one.
    Every turn has all tasks, so that none is measured only during a bad minute."""
    tasks = {task: [name for name, found in of_task(results, task).items() if "errors" in found] for task, _ in results}
    of_tasks = {task: [for_task(tensors, task) for tensors in sets] for task in tasks}
    gc.collect()
    gc.freeze()  # do not scan existing objects again between turns
    gc.disable()
    try:
        for turn in range(-len(sets), settings.repeats):  # negative ones are the warm-up
            for task, names in tasks.items():
                gc.collect()
                for name in order(names, turn):
                    tell(name)
                    seconds, is_spoilt = time_of(of_tasks[task][turn % len(sets)], name, task, settings)
                    if turn >= 0:
                        found = results[task, name]
                        found["spoilt"] = found.get("spoilt", 0) + is_spoilt
                        found.setdefault("seconds_all", []).append(seconds)
    finally:
        gc.enable()
        gc.unfreeze()
    for task, names in tasks.items():
        eager = results.get((task, EAGER), {})
        for name in names:
            tell(name)
            found = results[task, name]
            found["seconds"] = statistics.median(found["seconds_all"])
            if "seconds_all" in eager:
                found["time_ratio"] = statistics.median(ratios(found, eager))
            found |= counted(shape, task, name, of_tasks[task][0], settings)


def order(names: list[str], turn: int) -> list[str]:
    """Return the names rotated by one per turn, and reversed in every second round of rotations."""
    rounds, first = divmod(turn, max(1, len(names)))
    rotated = names[first:] + names[:first]
    return rotated[::-1] if rounds % 2 else rotated


def time_of(tensors: Inputs, name: str, task: str, settings: Settings) -> tuple[float, bool]:
    """Return seconds, and whether steal time spoilt them. On a GPU it does not matter."""

    def once() -> float:
        clear(tensors)
        seconds = seconds_of(lambda: run(tensors, name, task, settings), settings.device)
        clear(tensors)  # leaves memory for the other tasks
        return seconds

    return (once(), False) if settings.device == "cuda" else steal.least_disturbed(once)


def clear(tensors: Inputs) -> None:
    tensors.hidden.grad = tensors.weight.grad = None


def counted(shape: Shape, task: str, name: str, tensors: Inputs, settings: Settings) -> dict:
    """Return FLOPs and bytes, and on CUDA the memory."""
    provider, on_cuda = PROVIDERS[name], settings.device == "cuda"
    found = {"flops": work.flops(provider, task, shape), "bytes": work.bytes_moved(provider, task, shape)}

    def job():
        run(tensors, name, task, settings)

    if name == "mssr sparse":  # on CUDA its forward is a Triton kernel
        found["flops"] = work.executed_flops(job) + (work.flops(provider, "forward", shape) if on_cuda else 0)
        clear(tensors)
    if on_cuda:
        found["peak_extra_mib"] = memory.peak_extra_bytes(job, "cuda") / memory.MIB
        clear(tensors)
    return found


def peak_extra_mib(shape: Shape, task: str, name: str, settings: Settings) -> float:
    """Measure memory on a CPU, in a process of its own with `heap.give_back`."""
    tensors = for_task(make(shape, settings, settings.seed), task)
    run(tensors, name, task, settings)
    clear(tensors)
    return memory.peak_extra_bytes(lambda: run(tensors, name, task, settings), settings.device) / memory.MIB


def release(device: str):
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.synchronize()  # raises if a provider has broken the device
