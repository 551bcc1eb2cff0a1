"""Time and memory of the head as N, V and D grow, each alone, and as the vocabulary is split over ranks, with exponents.

    python -m bench.scaling [--out FOLDER]      # FOLDER/scaling.json; python -m bench.plots FOLDER draws it

Eager, and ours in each mode, forward and backward; both forward alone. Each axis has four points, 1/2 to 4 times the
base shape, and an exponent, fitted in log-log: 1 is growth in proportion, 0 none. The workspace is small enough that no
point's logits fit into it. On a CPU the whole takes about 4 minutes on 2 cores.

Ranks, on a CPU alone: gloo, one thread a rank, `group=` of our functions; of time and memory the rank with the most counts.
The same thread count for one rank and for two, so that time by rank would be -1 at best.
"""

import argparse
import datetime
import json
import math
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from . import machine
from .jobs import Settings
from .reports import EAGER, SCALING
from .scaling_parts import memory_of_points, on_ranks, times_of_shapes
from .shapes import Shape

AXES = ("n", "v", "d")
FACTORS = (0.5, 1, 2, 4)
RANKS = (1, 2)
# What is measured: the name in the report -> provider and task of `bench.kernels`.
JOBS = {
    EAGER: (EAGER, "loss"),
    "mssr exact": ("mssr exact", "loss"),
    "mssr sparse": ("mssr sparse", "loss"),
    "mssr recompute": ("mssr recompute", "loss"),
    "eager forward": (EAGER, "forward"),
    "mssr forward": ("mssr forward", "forward"),
}
OURS = ("mssr exact", "mssr sparse", "mssr recompute", "mssr forward")
MEASURES = ("seconds", "peak_extra_mib")
# n, d, v, dtype, MiB of workspace.
PRESETS = {"cpu": (512, 256, 16384, "float32", 8), "cuda": (4096, 2048, 65536, "bfloat16", 128)}


def main(words: list[str] | None = None) -> int:
    arguments = parse_arguments(words)
    report = measure(arguments)
    report["command"] = " ".join(["python -m bench.scaling", *(sys.argv[1:] if words is None else words)])
    show(report, Console(width=None if sys.stdout.isatty() else 160, highlight=False))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / SCALING).write_text(json.dumps(report, indent=2) + "\n")
    return 0


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    parser.add_argument("--n", type=int, help="tokens of the base shape")
    parser.add_argument("--d", type=int, help="hidden size")
    parser.add_argument("--v", type=int, help="vocabulary")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=f"write FOLDER/{SCALING}")
    arguments = parser.parse_args(words)
    n, d, v, arguments.dtype, arguments.workspace_mib = PRESETS[arguments.device]
    arguments.n, arguments.d, arguments.v = arguments.n or n, arguments.d or d, arguments.v or v
    if min(arguments.n, arguments.d, arguments.v) < 16 or arguments.repeats < 1:
        parser.error("--n, --d and --v are at least 16, --repeats 1")
    return arguments


def measure(arguments: argparse.Namespace) -> dict:
    """The report: `cases` (axis, size, n, d, v, ranks, providers) and `slopes` by provider, axis and what is measured.

    Raises:
        RuntimeError: a process of its own failed.
    """
    start = time.monotonic()
    settings = Settings(arguments.device, arguments.repeats, workspace_mib=arguments.workspace_mib, input_sets=1)
    base = Shape(None, arguments.n, arguments.d, arguments.v, arguments.dtype, "realistic")
    points = {(axis, size): base._replace(**{axis: size}) for axis in AXES for size in sizes(getattr(base, axis))}
    shapes = list(dict.fromkeys(points.values()))  # the base is on every axis and measured once
    found = dict(zip(shapes, times_of_shapes(shapes, JOBS, settings)))
    if arguments.device == "cpu":
        add_memory(found, settings)
    report_cases = [as_case(axis, size, shape, 1, found[shape]) for (axis, size), shape in points.items()]
    if arguments.device == "cpu":
        report_cases += [as_case("ranks", ranks, base, ranks, on_ranks(ranks, base, OURS, settings)) for ranks in RANKS]
    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine.facts(arguments.device),
        "settings": settings._asdict() | {"dtype": arguments.dtype, "rows": base.rows},
        "cases": report_cases,
        "slopes": slopes(report_cases),
        "seconds": time.monotonic() - start,
    }


def sizes(base: int) -> list[int]:
    return [int(base * factor) for factor in FACTORS]


def as_case(axis: str, size: int, shape: Shape, ranks: int, providers: dict) -> dict:
    return {
        "axis": axis,
        "size": size,
        "n": shape.n,
        "d": shape.d,
        "v": shape.v,
        "ranks": ranks,
        "providers": providers,
    }


def add_memory(found: dict[Shape, dict], settings: Settings):
    """On a CPU."""
    points = [
        (shape, {name: JOBS[name] for name, of_job in providers.items() if "error" not in of_job})
        for shape, providers in found.items()
    ]
    for providers, of_jobs in zip(found.values(), memory_of_points(points, settings)):
        for name, mib in of_jobs.items():
            providers[name]["peak_extra_mib"] = mib


def slopes(report_cases: list[dict]) -> dict[str, dict[str, dict[str, float]]]:
    """provider -> axis -> what -> exponent of its growth. What was not measured at two sizes has none."""
    found = {}
    for provider in JOBS:
        for axis in (*AXES, "ranks"):
            for what in MEASURES:
                points = [
                    (case["size"], case["providers"][provider][what])
                    for case in report_cases
                    if case["axis"] == axis and case["providers"].get(provider, {}).get(what, 0) > 0
                ]
                if len(points) > 1:
                    found.setdefault(provider, {}).setdefault(axis, {})[what] = exponent(points)
    return found


def exponent(points: list[tuple[float, float]]) -> float:
    """The slope of the least-squares line through (log size, log value)."""
    x, y = ([math.log(value) for value in values] for values in zip(*points))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / sum((a - mean_x) ** 2 for a in x)


def show(report: dict, console: Console):
    console.print(
        f"{report['seconds']:.0f} s; " + ", ".join(f"{key} {value}" for key, value in report["settings"].items())
    )
    console.print(", ".join(f"{key} {value}" for key, value in report["machine"].items()))
    for axis in dict.fromkeys(case["axis"] for case in report["cases"]):
        of_axis = [case for case in report["cases"] if case["axis"] == axis]
        table = Table(f"by {axis.upper() if len(axis) == 1 else axis}: seconds, MiB", box=None, padding=(0, 2))
        for case in of_axis:
            table.add_column(f"{case['size']:,}", justify="right")
        table.add_column("exponents", justify="right")
        for provider in dict.fromkeys(provider for case in of_axis for provider in case["providers"]):
            fitted = report["slopes"].get(provider, {}).get(axis, {})
            exponents = ", ".join(f"{fitted[what]:.2f}" if what in fitted else "none" for what in MEASURES)
            table.add_row(provider, *(cell(case["providers"].get(provider, {})) for case in of_axis), exponents)
        console.print(table)


def cell(found: dict) -> str:
    if "error" in found:
        return "failed"
    size = f", {found['peak_extra_mib']:.0f}" if "peak_extra_mib" in found else ""
    return f"{found['seconds']:.4f}{size}" if "seconds" in found else ""


if __name__ == "__main__":
    sys.exit(main())
