"""A plan as tables and as JSON: memory by phase, the changes that make the run fit, step time, assumptions."""

import json
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mssr.planning.plan import RunPlan
from mssr.planning.step_time import NOTES
from mssr.stopwatch import GIB

PHASES = ("generate", "scoring", "forward_backward", "optimizer")


def as_json(plan: RunPlan) -> str:
    """Return one JSON object; memory in GiB, time in seconds."""
    return json.dumps(_as_dict(plan), indent=2)


def _as_dict(plan: RunPlan) -> dict[str, Any]:
    memory, parameters = plan.memory, plan.memory.parameters
    return {
        "model": plan.model,
        "parameters": parameters.total,
        "trained_parameters": parameters.trained,
        "gpu": plan.gpu.key,
        "gpus": plan.machine.gpus,
        "device_gib": _gib(plan.machine.memory),
        "memory_gib": {
            phase: {part: _gib(size) for part, size in parts.items()} | {"total": _gib(memory.total(phase))}
            for phase, parts in memory.phases.items()
        },
        "peak_gib": _gib(memory.peak),
        "peak_phase": memory.worst,
        "host_gib_per_rank": {part: _gib(size) for part, size in memory.host.items()},
        "fits": plan.fits,
        "advice": None
        if plan.advice is None
        else {"changes": plan.advice.changes, "peak_gib": _gib(plan.advice.peak), "fits": plan.advice.fits},
        "step_seconds_estimate": None
        if plan.time is None
        else {phase: round(seconds, 2) for phase, seconds in plan.time.seconds.items()}
        | {"total": round(plan.time.total, 2)},
        "concurrent_responses": None if plan.time is None else plan.time.concurrent,
        "mean_tokens": {"prompt": plan.mean.prompt, "response": plan.mean.response, "image": plan.mean.image},
        "assumptions": [*plan.assumptions, *(NOTES if plan.time else ())],
    }


def print_plan(plan: RunPlan, console: Console | None = None) -> None:
    console = console or Console(highlight=False)
    parameters = plan.memory.parameters
    console.print(
        f"{plan.model}: {parameters.total / 1e9:.2f} billion parameters, {parameters.trained / 1e9:.2f} trained, "
        f"on {plan.machine.gpus} x {plan.gpu.key} ({_gib(plan.machine.memory)} GiB)"
    )
    console.print(Text("\nPredicted GPU memory per rank at each phase's peak, GiB", "bold"))
    console.print(_memory_table(plan))
    _print_verdict(plan, console)
    if plan.memory.host:
        parts = ", ".join(f"{part} {_gib(size)}" for part, size in plan.memory.host.items())
        total = sum(plan.memory.host.values())
        console.print(f"\nHost memory: {_gib(total)} GiB per rank, {_gib(total * plan.machine.gpus)} for all ({parts})")
    if plan.time is not None:
        _print_time(plan, console)
    console.print(Text("\nAssumptions", "bold"))
    for note in (*plan.assumptions, *(NOTES if plan.time else ())):
        console.print(Padding(Text(note, "dim"), (0, 0, 0, 2)))


def _memory_table(plan: RunPlan) -> Table:
    memory = plan.memory
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("part")
    for phase in PHASES:
        table.add_column(phase, justify="right")
    parts = list(dict.fromkeys(part for phase in PHASES for part in memory.phases[phase]))
    for part in parts:
        sizes = [memory.phases[phase].get(part) for phase in PHASES]
        table.add_row(part, *("" if size is None else str(_gib(size)) for size in sizes))
    table.add_row(
        Text("total", "bold"),
        *(Text(str(_gib(memory.total(phase))), _colour(memory.total(phase), plan)) for phase in PHASES),
    )
    return table


def _print_verdict(plan: RunPlan, console: Console) -> None:
    peak, room = _gib(plan.memory.peak), _gib(plan.machine.memory)
    if plan.fits:
        console.print(Text(f"✓ fits: {peak} of {room} GiB, in {plan.memory.worst}", "green"))
        return
    console.print(Text(f"✗ does not fit: {peak} of {room} GiB, in {plan.memory.worst}", "bold red"))
    if plan.advice is None:
        console.print("  no setting that was tried needs less; use more GPUs, or larger ones")
        return
    end = "with" if plan.advice.fits else "is the least that was found, not enough, with"
    console.print(f"  {_gib(plan.advice.peak)} GiB {end}")
    for change in plan.advice.changes:
        console.print(Text(f"    {change}", "bold"), soft_wrap=True)


def _print_time(plan: RunPlan, console: Console) -> None:
    mean = plan.mean
    console.print(
        Text("\nSeconds per step, estimated from data sheets: nothing was measured", "bold"),
        f"  (prompts of {mean.prompt} tokens, responses of {mean.response}, "
        f"{plan.time.concurrent} decoded at once per rank)",
    )
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for phase in (*plan.time.seconds, "total"):
        table.add_column(phase, justify="right")
    table.add_row(*(f"{seconds:.1f}" for seconds in (*plan.time.seconds.values(), plan.time.total)))
    console.print(table)


def _colour(size: int, plan: RunPlan) -> str:
    return "bold" if size <= plan.machine.memory else "bold red"


def _gib(size: int) -> float:
    return round(size / GIB, 1)
