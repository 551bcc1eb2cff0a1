"""The cases of one shape, measured in this process: every provider checked against float64, then timed in turns."""

import gc
import statistics
import time
from collections.abc import Callable

import torch

from . import accuracy, inputs, memory, steal, work
from .inputs import Inputs
from .jobs import Provider, Rows, Settings
from .providers import EAGER, PROVIDERS
from .roofs import synchronize
from .shapes import Shape

Failures = dict[tuple[str, str], str]  # (task, provider) -> why


def measure(
    shape: Shape,
    tasks: list[str],
    names: list[str],
    settings: Settings,
    tell: Callable[[str], None] = lambda name: None,
) -> list[dict]:
    """A case for each task: `python -m bench.kernels` says what is in it. Memory on CUDA alone, shares of a roof not yet.

    tell: called with a provider's name before it runs, and with "" when others do. A provider that raises when it is checked
    has its error for a result; a dead process is the caller's to see.
    """
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # by default it would go on in eager and say so nowhere
    sets = [make(shape, settings, settings.seed + index) for index in range(settings.input_sets)]
    here = {
        task: [name for name in names if task in PROVIDERS[name].tasks and _is_wanted(name, settings)] for task in tasks
    }
    errors, failed = check(shape, here, sets[0], settings, tell)
    running = {task: [name for name in here[task] if (task, name) not in failed] for task in tasks}
    found, measured = timed(shape, running, sets, settings, tell), []
    for task in tasks:
        results = {name: result | {"errors": errors[task, name]} for name, result in found[task].items()}
        results |= {name: {"error": why} for (of, name), why in failed.items() if of == task}
        providers = {name: {"work": PROVIDERS[name].work} | results[name] for name in here[task]}
        measured.append({**shape._asdict(), "task": task, "mean_entropy": sets[0].mean_entropy, "providers": providers})
    return measured


def _is_wanted(name: str, settings: Settings) -> bool:
    """Peers are listed even where they cannot run; ours that need CUDA are on the CPU what "auto" is, and listed."""
    return not (name.startswith("mssr") and PROVIDERS[name].needs_cuda and settings.device != "cuda")


def make(shape: Shape, settings: Settings, seed: int) -> Inputs:
    dtype = getattr(torch, shape.dtype)
    return inputs.make(shape.n, shape.d, shape.v, dtype, settings.device, shape.rows, seed, shape.softcap)


def for_task(tensors: Inputs, task: str) -> Inputs:
    return inputs.with_gradients(tensors, hidden=task != "forward", weight=task == "loss")


def run(tensors: Inputs, name: str, task: str, settings: Settings):
    """The job once. tensors: of `for_task`."""
    provider = PROVIDERS[name]
    if task == "forward":
        with torch.no_grad():
            (provider.rows or provider.loss)(tensors, settings)
    else:
        provider.loss(tensors, settings).backward()


def check(
    shape: Shape, names: dict[str, list[str]], tensors: Inputs, settings: Settings, tell: Callable[[str], None]
) -> tuple[dict, Failures]:
    """Errors against float64 of every task and provider; also the first time that each runs."""
    errors, failed = {}, {}
    rows = accuracy.rows_of(shape.n, shape.d, shape.v, settings.device)
    everyone = list(dict.fromkeys(name for of_task in names.values() for name in of_task))
    for objective in dict.fromkeys(PROVIDERS[name].objective for name in everyone):
        exact = accuracy.exact(tensors, objective, rows)
        for name in (name for name in everyone if PROVIDERS[name].objective == objective):
            for task in (task for task in names if name in names[task]):
                tell(name)
                why = PROVIDERS[name].why_not(settings.device, shape.softcap)
                if why is None:
                    try:
                        errors[task, name] = errors_of(for_task(tensors, task), name, task, exact, settings)
                    except Exception as error:
                        why = reason(error)
                if why is not None:
                    failed[task, name] = why
                    release(settings.device)  # if it has broken the device, now is when it shows
                tell("")
            release(settings.device)
    return errors, failed


def errors_of(tensors: Inputs, name: str, task: str, exact: accuracy.Exact, settings: Settings) -> dict[str, float]:
    provider = PROVIDERS[name]
    run(tensors, name, task, settings)
    gradients = tensors.hidden.grad, tensors.weight.grad
    if task != "loss":  # a gradient that nobody asked for is not looked at
        gradients = gradients[0], None
    with torch.set_grad_enabled(task != "forward"):
        rows = provider.rows(tensors, settings) if provider.rows else Rows(None, None)
    return accuracy.errors(exact, *rows, *gradients)


def timed(
    shape: Shape, names: dict[str, list[str]], sets: list[Inputs], settings: Settings, tell: Callable[[str], None]
) -> dict[str, dict[str, dict]]:
    """task -> provider -> what was measured. names: the providers of each task.

    Everybody runs once in a turn, and a ratio is the median of the ratios within a turn: what slows the machine down slows
    all of them. Each turn takes the next set of inputs, in another order: nobody always follows the same one. Every turn has
    all tasks, so that each is measured over the whole time and none in a bad minute alone."""
    count, sets = len(sets), {task: [for_task(tensors, task) for tensors in sets] for task in names}
    seconds = {task: {name: [] for name in names[task]} for task in names}
    spoilt = {task: dict.fromkeys(names[task], 0) for task in names}
    gc.collect()
    gc.freeze()  # what is there already is not looked through again between turns
    gc.disable()
    try:
        for turn in range(-count, settings.repeats):  # those below 0 are the warm-up
            for task in names:
                gc.collect()
                tensors = sets[task][turn % count]
                for name in order(names[task], turn):
                    tell(name)
                    taken, is_spoilt = time_of(tensors, name, task, settings)
                    if turn >= 0:
                        seconds[task][name].append(taken)
                        spoilt[task][name] += is_spoilt
    finally:
        gc.enable()
        gc.unfreeze()
    found = {task: {} for task in names}
    for task in names:
        for name in names[task]:
            tell(name)
            figures = result(shape, task, name, seconds[task], sets[task][0], settings)
            found[task][name] = {"spoilt": spoilt[task][name]} | figures
    return found


def order(names: list[str], turn: int) -> list[str]:
    """Rotated by one from turn to turn, and when all have been first, backwards."""
    rounds, first = divmod(turn, max(1, len(names)))
    rotated = names[first:] + names[:first]
    return rotated[::-1] if rounds % 2 else rotated


def time_of(tensors: Inputs, name: str, task: str, settings: Settings) -> tuple[float, bool]:
    """Seconds, and whether the host spoilt them. A GPU does its work meanwhile."""
    if settings.device == "cuda":
        return seconds_of(tensors, name, task, settings), False
    return steal.least_disturbed(lambda: seconds_of(tensors, name, task, settings))


def seconds_of(tensors: Inputs, name: str, task: str, settings: Settings) -> float:
    tensors.hidden.grad = tensors.weight.grad = None
    synchronize(settings.device)
    start = time.perf_counter()
    run(tensors, name, task, settings)
    synchronize(settings.device)
    seconds = time.perf_counter() - start
    tensors.hidden.grad = tensors.weight.grad = None  # not in the way of the other tasks
    return seconds


def result(
    shape: Shape, task: str, name: str, seconds: dict[str, list[float]], tensors: Inputs, settings: Settings
) -> dict:
    provider: Provider = PROVIDERS[name]
    found = {"seconds": statistics.median(seconds[name]), "seconds_all": seconds[name]}
    if EAGER in seconds:
        found["time_ratio"] = statistics.median(a / b for a, b in zip(seconds[name], seconds[EAGER]))
    found |= {"flops": work.flops(provider, task, shape), "bytes": work.bytes_moved(provider, task, shape)}

    def job():
        run(tensors, name, task, settings)

    if name == "mssr sparse":
        tensors.hidden.grad = tensors.weight.grad = None
        found |= work.of_sparse(job, task, shape, settings.device, settings.workspace_bytes)
    if settings.device == "cuda":
        tensors.hidden.grad = tensors.weight.grad = None
        found["peak_extra_mib"] = memory.peak_extra_bytes(job, "cuda") / memory.MIB
    tensors.hidden.grad = tensors.weight.grad = None
    return found


def peak_extra_mib(shape: Shape, task: str, name: str, settings: Settings) -> float:
    """On the CPU: of a process of its own, with `heap.give_back`."""
    tensors = for_task(make(shape, settings, settings.seed), task)
    run(tensors, name, task, settings)
    tensors.hidden.grad = tensors.weight.grad = None
    return memory.peak_extra_bytes(lambda: run(tensors, name, task, settings), settings.device) / memory.MIB


def reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def release(device: str):
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.synchronize()  # raises where a provider has broken the device
