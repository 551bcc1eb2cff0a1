"""Plots of reports: time and memory by case, and how they grow.

    python -m bench.plots FOLDER      # kernels.png from kernels.json, scaling.png from scaling.json

In kernels.png a case per row and a bar with its value per provider: ours blue, eager dark; a provider without figures says
why. In scaling.png an axis per row, log-log, with the exponent beside each name.
"""

import argparse
import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: it keeps every figure and picks a backend for the whole process

from mssr.errors import UserError

from .report import EAGER, KERNELS, SCALING, facts, is_ours, load, load_kernels, measured, mib, name, seconds, why

PICTURES = {KERNELS: "kernels.png", SCALING: "scaling.png"}
OURS, PEER, BASE, INK, GRID = "#2f6db5", "#b9bec6", "#5c5f66", "#33363b", "#e3e5e8"
LONGEST = 50  # characters of a reason


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    try:
        written = plot_folder(parser.parse_args(words).folder)
    except UserError as error:
        print(f"bench.plots: {error}", file=sys.stderr)
        return 2
    print("\n".join(map(str, written)))
    return 0


def plot_folder(folder: Path) -> list[Path]:
    """Write the PNGs beside their reports; return their paths.

    Raises:
        UserError: there is no report, or one without cases.
    """
    written = []
    for file, plot in ((KERNELS, plot_cases), (SCALING, plot_scaling)):
        if (folder / file).exists():
            report = load_kernels(folder) if file == KERNELS else load(folder, file)
            if not report["cases"]:
                raise UserError(f"{folder / file}: no case was measured; measure again")
            written.append(folder / PICTURES[file])
            plot(report).savefig(written[-1], dpi=110)
    if not written:
        raise UserError(f"{folder}: has neither {KERNELS} nor {SCALING}; measure one with --out {folder}")
    return written


def grid(report: dict, rows: int, height: float) -> tuple[Figure, list[list[Axes]]]:
    """Return a figure and its rows of two panels, for time and memory."""
    figure = Figure(figsize=(13.2, height * rows + 0.7), layout="constrained", facecolor="white")
    panels = figure.subplots(rows, 2, squeeze=False).tolist()
    for axes in (axes for row in panels for axes in row):
        axes.grid(color=GRID)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK, labelsize=8)
    figure.supxlabel(f"{report['date']}, {facts(report)}", x=0.01, ha="left", fontsize=7, color=BASE)
    return figure, panels


def plot_cases(report: dict) -> Figure:
    cases = report["cases"]
    figure, panels = grid(report, len(cases), 0.27 * max(len(case["providers"]) for case in cases) + 1.0)
    for (left, right), case in zip(panels, cases):
        left.set_title(name(case), loc="left", fontsize=9, fontweight="bold", color=INK)
        if any("time_ratio" in found for found in measured(case).values()):
            draw_bars(left, case, "time_ratio", "time relative to eager (shorter is better)")
        else:
            draw_bars(left, case, "seconds", "seconds; eager did not run")
        draw_bars(right, case, "peak_extra_mib", "peak memory beyond the inputs, MiB (shorter is better)")
    return figure


def draw_bars(axes: Axes, case: dict, what: str, words: str) -> None:
    """Draw a bar per provider, in the order of the report."""
    for row, (provider, found) in enumerate(case["providers"].items()):
        colour = OURS if is_ours(provider) else BASE if provider == EAGER else PEER
        axes.barh(row, found.get(what, 0), height=0.72, color=colour)
        ink = "#a03030" if "error" in found else INK
        axes.annotate(f" {label(found, what)}", (found.get(what, 0), row), va="center", fontsize=7.5, color=ink)
    axes.set_yticks(range(len(case["providers"])), list(case["providers"]))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.32 * max((found[what] for found in case["providers"].values() if what in found), default=1.0))
    axes.set_xlabel(words, fontsize=8, color=INK)


def label(found: dict, what: str) -> str:
    if "seconds" not in found:
        return why(found)[:LONGEST]
    if what == "peak_extra_mib":
        return mib(found[what]) if what in found else "not measured"
    ratio = f"{found['time_ratio']:.2f}×  " if "time_ratio" in found else ""
    return ratio + seconds(found["seconds"])


def plot_scaling(report: dict) -> Figure:
    axes_names = list(dict.fromkeys(case["axis"] for case in report["cases"]))
    figure, panels = grid(report, len(axes_names), 3.3)
    for row, axis in zip(panels, axes_names):
        cases = [case for case in report["cases"] if case["axis"] == axis]
        for axes, what, unit in zip(row, ("seconds", "peak_extra_mib"), ("seconds", "MiB")):
            draw_growth(axes, cases, axis, what, report["slopes"])
            axes.set_ylabel(unit, fontsize=8, color=INK)
    return figure


def draw_growth(axes: Axes, cases: list[dict], axis: str, what: str, slopes: dict) -> None:
    for place, (provider, slope) in enumerate(slopes.items()):  # the same colour on every axis
        points = [(case["size"], case["providers"].get(provider, {}).get(what)) for case in cases]
        points = sorted((size, value) for size, value in points if value)
        if points:
            exponent = f"  {slope[axis][what]:.2f}" if what in slope.get(axis, {}) else ""
            axes.plot(*zip(*points), label=provider + exponent, color=f"C{place}", marker="so^Dvx"[place % 6])
    axes.set(xscale="log", yscale="log")
    fixed = ", ".join(f"{part.upper()} {cases[0][part]:,}" for part in ("n", "d", "v") if part != axis)
    axes.set_title(f"by {axis.upper()}; {fixed}", loc="left", fontsize=9, color=INK)
    axes.legend(fontsize=7.5, frameon=False, labelcolor=INK, loc="center left", bbox_to_anchor=(1.0, 0.5))


if __name__ == "__main__":
    sys.exit(main())
