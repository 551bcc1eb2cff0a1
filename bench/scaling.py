"""Time and memory of the head as N, V and D grow, one at a time.

    python -m bench.scaling [--out FOLDER]      # FOLDER/scaling.json; python -m bench.plots FOLDER draws it

Eager, and ours in modes L, S and G, forward and backward; eager and ours also forward alone. Each axis has four points, 1/2
to 4 times the base shape, and an exponent, fitted in log-log: 1 is proportional growth, 0 none. The workspace is small enough
that no point's logits fit into it.
"""

import argparse
import math
import sys
from pathlib import Path

import torch

from . import report as report_of
from . import tables
from .jobs import Settings
from .kernels import Run, positive
from .report import EAGER, SCALING
from .shapes import Shape

AXES = ("n", "v", "d")
FACTORS = (0.5, 1, 2, 4)
OURS = ["mssr L", "mssr S", "mssr G", "mssr forward"]
MEASURES = ("seconds", "peak_extra_mib")
KEPT = ("seconds", "seconds_all", "spoilt", "peak_extra_mib", "error", "skipped")
PRESETS = {  # the base shape, and MiB of workspace
    "cpu": (Shape(None, 512, 256, 16384, "float32", "realistic"), 8),
    "cuda": (Shape(None, 4096, 2048, 65536, "bfloat16", "realistic"), 128),
}


def main(words: list[str] | None = None) -> int:
    arguments = parse_arguments(words)
    report = measure(arguments, words)
    report_of.show(tables.scaling(report))
    report_of.save(report, arguments.out and arguments.out / SCALING)
    return int(bool(report["not_run"]) or any(map(report_of.failures, report["cases"])))


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=f"write FOLDER/{SCALING}")
    return parser.parse_args(words)


def measure(arguments: argparse.Namespace, words: list[str] | None = None) -> dict:
    """Return the report: `cases` (axis, size, n, d, v, providers), and `slopes` by provider, axis and measure."""
    base, workspace_mib = PRESETS[arguments.device]
    settings = Settings(arguments.device, arguments.repeats, workspace_mib=workspace_mib, input_sets=1)
    points = {
        (axis, size): base._replace(**{axis: size})
        for axis in AXES
        for size in (int(getattr(base, axis) * factor) for factor in FACTORS)
    }
    facts = settings._asdict() | {"dtype": base.dtype, "rows": base.rows}
    report = report_of.new("bench.scaling", words, arguments.device, facts)
    run = Run(report, None, settings)
    # The base is on every axis and measured once.
    found = {shape: by_job(run.measure(shape, ["loss", "forward"], OURS)) for shape in dict.fromkeys(points.values())}
    report["cases"] = [
        {"axis": axis, "size": size, "n": shape.n, "d": shape.d, "v": shape.v, "providers": found[shape]}
        for (axis, size), shape in points.items()
    ]
    return report | {"slopes": slopes(report["cases"])}


def by_job(cases: list[dict]) -> dict[str, dict]:
    """Return the figures of both tasks by name; eager, which has both, is "eager" and "eager forward"."""
    return {
        name if case["task"] == "loss" or name in OURS else f"{name} forward": {
            key: found[key] for key in KEPT if key in found
        }
        for case in cases
        for name, found in case["providers"].items()
    }


def slopes(cases: list[dict]) -> dict[str, dict[str, dict[str, float]]]:
    """Return exponents by provider, axis and measure. What was not measured at two sizes has none."""
    found: dict = {}
    for provider in dict.fromkeys([EAGER, *(name for case in cases for name in case["providers"])]):
        for axis in AXES:
            for what in MEASURES:
                points = [
                    (case["size"], case["providers"][provider][what])
                    for case in cases
                    if case["axis"] == axis and case["providers"].get(provider, {}).get(what, 0) > 0
                ]
                if len(points) > 1:
                    found.setdefault(provider, {}).setdefault(axis, {})[what] = exponent(points)
    return found


def exponent(points: list[tuple[float, float]]) -> float:
    """Return the slope of the least-squares line through (log size, log value)."""
    x, y = ([math.log(value) for value in values] for values in zip(*points))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / sum((a - mean_x) ** 2 for a in x)


if __name__ == "__main__":
    sys.exit(main())
