"""A plan as tables and as JSON: memory by phase, the changes that make the run fit, step time, assumptions."""

import json
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from mssr.planning.plan import RunPlan
from mssr.planning.step_time import StepTime
from mssr.stopwatch import GIB


def as_json(plan: RunPlan) -> str:
    """Return one JSON object; memory in GiB, time in seconds."""
    return json.dumps(_as_dict(plan), indent=2)


def _as_dict(plan: RunPlan) -> dict[str, Any]:
    memory, parameters, advice = plan.memory, plan.memory.parameters, plan.advice
    time = plan.time
    return {
        "model": plan.model,
        "parameters": parameters.total,
        "trained_parameters": parameters.trained,
        "gpu": plan.machine.gpu.key,
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
        "advice": advice and {"changes": advice.changes, "peak_gib": _gib(advice.peak), "fits": advice.fits},
        # Nothing is estimated for a run that could not start.
        "step_seconds_estimate": time and _seconds(time),
        "concurrent_responses": time and time.concurrent,
        "mean_tokens": asdict(plan.mean),
        "assumptions": plan.assumptions,
    }


def _seconds(time: StepTime) -> dict[str, float]:
    return {phase: round(value, 2) for phase, value in (time.seconds | {"total": time.total}).items()}


def print_plan(plan: RunPlan) -> None:
    console, found, mean = Console(highlight=False), _as_dict(plan), plan.mean
    console.print(
        f"{plan.model}: {found['parameters'] / 1e9:.2f} billion parameters, {found['trained_parameters'] / 1e9:.2f} "
        f"trained, on {found['gpus']} x {found['gpu']} ({found['device_gib']} GiB)"
    )
    console.print(Text("\nPredicted GPU memory per rank at each phase's peak, GiB", "bold"))
    console.print(_table(found["memory_gib"]))
    _print_verdict(found, console)
    if host := plan.memory.host:
        parts = ", ".join(f"{part} {_gib(size)}" for part, size in host.items())
        total = sum(host.values())
        console.print(f"\nHost memory: {_gib(total)} GiB per rank, {_gib(total * found['gpus'])} for all ({parts})")
    if plan.time:
        console.print(
            Text("\nSeconds per step, estimated from data sheets: nothing was measured", "bold"),
            f"  (prompts of {mean.prompt} tokens, responses of {mean.response}, "
            f"{plan.time.concurrent} decoded at once per rank)",
        )
        console.print(_table({phase: {"": seconds} for phase, seconds in found["step_seconds_estimate"].items()}))
    console.print(Text("\nAssumptions", "bold"))
    for note in plan.assumptions:
        console.print(Padding(Text(note, "dim"), (0, 0, 0, 2)))


def _table(columns: dict[str, dict[str, float]]) -> Table:
    """Return a table with a column per phase and a row per part, the total last."""
    headers = (Column(phase, justify="right") for phase in columns)
    table = Table("", *headers, box=None, padding=(0, 2, 0, 0), header_style="dim")
    parts = dict.fromkeys(part for sizes in columns.values() for part in sizes)
    for part in sorted(parts, key="total".__eq__):
        cells = (f"{sizes[part]:.1f}" if part in sizes else "" for sizes in columns.values())
        table.add_row(part, *cells, style="bold" if part == "total" else "")
    return table


def _print_verdict(found: dict[str, Any], console: Console) -> None:
    needed = f"{found['peak_gib']} of {found['device_gib']} GiB, in {found['peak_phase']}"
    if found["fits"]:
        console.print(Text(f"✓ fits: {needed}", "green"))
        return
    console.print(Text(f"✗ does not fit: {needed}", "bold red"))
    advice = found["advice"]
    if advice is None:
        console.print("  no setting that was tried needs less; use more GPUs, or larger ones")
        return
    end = "with" if advice["fits"] else "is the least that was found, not enough, with"
    console.print(f"  {advice['peak_gib']} GiB {end}")
    for change in advice["changes"]:
        console.print(Text(f"    {change}", "bold"), soft_wrap=True)


def _gib(size: int) -> float:
    return round(size / GIB, 1)
