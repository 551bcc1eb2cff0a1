"""Prints a plan: memory by phase, the changes that make the run fit, step time, assumptions."""

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mssr.planning.plan import RunPlan
from mssr.planning.step_time import NOTES
from mssr.stopwatch import GIB

PHASES = ("generate", "scoring", "forward_backward", "optimizer")


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
