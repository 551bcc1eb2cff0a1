"""The cases of one shape, measured in this process: every provider checked against float64, then timed in turns."""

import gc
import statistics
import time
from collections.abc import Callable

import torch

from . import accuracy, inputs, memory, steal, work
from .inputs import Inputs
from .jobs import Provider, Rows, Settings
from .providers import PROVIDERS
from .report import EAGER
from .roofs import synchronize
from .shapes import Shape

Failures = dict[tuple[str, str], dict]  # (task, provider) -> {"skipped": why} or {"error": why}


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
    here = {
        task: [name for name in names if task in PROVIDERS[name].tasks and _is_wanted(name, settings)] for task in tasks
    }
    errors, failed = check(shape, here, sets[0], settings, tell)
    running = {task: [name for name in here[task] if (task, name) not in failed] for task in tasks}
    found, measured = timed(shape, running, sets, settings, tell), []
    for task in tasks:
        results = {name: result | {"errors": errors[task, name]} for name, result in found[task].items()}
        results |= {name: why for (of, name), why in failed.items() if of == task}
        providers = {name: {"work": PROVIDERS[name].work} | results[name] for name in here[task]}
        measured.append({**shape._asdict(), "task": task, "mean_entropy": sets[0].mean_entropy, "providers": providers})
    return measured


def _is_wanted(name: str, settings: Settings) -> bool:
    """Peers are listed even if they cannot run; on a CPU our "chunked" providers are the same as "auto"."""
    return not (name.startswith("mssr") and PROVIDERS[name].needs_cuda and settings.device != "cuda")


def make(shape: Shape, settings: Settings, seed: int) -> Inputs:
    dtype = getattr(torch, shape.dtype)
    return inputs.make(shape.n, shape.d, shape.v, dtype, settings.device, shape.rows, seed, shape.softcap)


def for_task(tensors: Inputs, task: str) -> Inputs:
    return inputs.with_gradients(tensors, hidden=task != "forward", weight=task == "loss")


def run(tensors: Inputs, name: str, task: str, settings: Settings):
    """Do the job once. tensors: of `for_task`."""
    provider = PROVIDERS[name]
    if task == "forward":
        with torch.no_grad():
            (provider.rows or provider.loss)(tensors, settings)
    else:
        provider.loss(tensors, settings).backward()


def check(
    shape: Shape, names: dict[str, list[str]], tensors: Inputs, settings: Settings, tell: Callable[[str], None]
) -> tuple[dict, Failures]:
    """Return each provider's errors against float64, by task; also warms up and compiles."""
    errors, failed = {}, {}
    rows = accuracy.rows_of(shape.n, shape.d, shape.v, settings.device)
    everyone = list(dict.fromkeys(name for of_task in names.values() for name in of_task))
    for objective in dict.fromkeys(PROVIDERS[name].objective for name in everyone):
        exact = accuracy.exact(tensors, objective, rows)
        for name in (name for name in everyone if PROVIDERS[name].objective == objective):
            for task in (task for task in names if name in names[task]):
                tell(name)
                if why := PROVIDERS[name].why_not(settings.device, shape.softcap):
                    failed[task, name] = {"skipped": why}
                else:
                    try:
                        errors[task, name] = errors_of(for_task(tensors, task), name, task, exact, settings)
                    except Exception as error:
                        failed[task, name] = failure(name, error)
                        release(settings.device)  # if it has broken the device, it shows here
                tell("")
            release(settings.device)
    return errors, failed


def errors_of(tensors: Inputs, name: str, task: str, exact: accuracy.Exact, settings: Settings) -> dict[str, float]:
    provider = PROVIDERS[name]
    run(tensors, name, task, settings)
    gradients = tensors.hidden.grad, tensors.weight.grad
    if task != "loss":  # ignore a gradient that the task does not ask for
        gradients = gradients[0], None
    with torch.set_grad_enabled(task != "forward"):
        rows = provider.rows(tensors, settings) if provider.rows else Rows(None, None)
    return accuracy.errors(exact, *rows, *gradients)


def timed(
    shape: Shape, names: dict[str, list[str]], sets: list[Inputs], settings: Settings, tell: Callable[[str], None]
) -> dict[str, dict[str, dict]]:
    """Return figures by task and provider. names: the providers of each task.

    All providers run once per turn, and a ratio is the median of the ratios within turns, so that a slow machine slows all of
    them alike. Each turn takes the next set of inputs and another order, so that no provider always follows the same one.
    Every turn has all tasks, so that none is measured only during a bad minute."""
    count, sets = len(sets), {task: [for_task(tensors, task) for tensors in sets] for task in names}
    seconds = {task: {name: [] for name in names[task]} for task in names}
    spoilt = {task: dict.fromkeys(names[task], 0) for task in names}
    gc.collect()
    gc.freeze()  # do not scan again between turns what exists already
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
    """Return the names rotated by one per turn; once each has been first, in reverse order."""
    rounds, first = divmod(turn, max(1, len(names)))
    rotated = names[first:] + names[:first]
    return rotated[::-1] if rounds % 2 else rotated


def time_of(tensors: Inputs, name: str, task: str, settings: Settings) -> tuple[float, bool]:
    """Return seconds, and whether the host spoilt them. A GPU works on meanwhile."""
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
    tensors.hidden.grad = tensors.weight.grad = None  # leaves memory for the other tasks
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

    on_cuda = settings.device == "cuda"
    if name == "mssr sparse":  # on CUDA its forward is a Triton kernel
        tensors.hidden.grad = tensors.weight.grad = None
        found["flops"] = work.executed_flops(job) + (work.flops(provider, "forward", shape) if on_cuda else 0)
    if on_cuda:
        tensors.hidden.grad = tensors.weight.grad = None
        found["peak_extra_mib"] = memory.peak_extra_bytes(job, "cuda") / memory.MIB
    tensors.hidden.grad = tensors.weight.grad = None
    return found


def peak_extra_mib(shape: Shape, task: str, name: str, settings: Settings) -> float:
    """Measure memory on a CPU, in a process of its own with `heap.give_back`."""
    tensors = for_task(make(shape, settings, settings.seed), task)
    run(tensors, name, task, settings)
    tensors.hidden.grad = tensors.weight.grad = None
    return memory.peak_extra_bytes(lambda: run(tensors, name, task, settings), settings.device) / memory.MIB


def failure(name: str, error: Exception) -> dict:
    """Return {"skipped"} if a package that a peer imports is missing, else {"error"}."""
    if isinstance(error, ModuleNotFoundError) and PROVIDERS[name].package:
        return {"skipped": f"not installed: {error.name}, which {PROVIDERS[name].package.name} imports"}
    lines = str(error).strip().splitlines()
    return {"error": f"{type(error).__name__}: {lines[0][:200] if lines else ''}"}


def release(device: str):
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.synchronize()  # raises if a provider has broken the device
