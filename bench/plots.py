"""Pictures of measured reports: time, memory, share of the roof and accuracy by case, and how cost grows.

    python -m bench.plots FOLDER      # of kernels.json: time, memory, roof, accuracy; of scaling.json: scaling; as PNGs there

A case a panel, a provider a bar with its value. Ours are blue, eager is dark; one that failed says why in place of its bar.
Accuracy is error against float64 by time: what is fast and wrong lies far above the others.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # never pyplot: it keeps every figure and picks a backend for the whole process
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator, PercentFormatter

from mssr.errors import UserError

from .reports import EAGER, KERNELS, SCALING, facts, failed, is_ours, load, load_kernels, measured, mib, name, seconds

OURS, PEER, BASE, INK, GRID = "#2f6db5", "#b9bec6", "#5c5f66", "#33363b", "#e3e5e8"
LINES = ("#5c5f66", "#2f6db5", "#3a9e6f", "#e07b39", "#b5479b", "#c9a227")
MARKERS = "so^Dvx"
DPI = 120
REASON = 58  # characters of an error
LABEL_GAP = 0.075  # of a panel's height, between labels


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    folder = parser.parse_args(words).folder
    try:
        written = plot_folder(folder)
    except UserError as error:
        print(f"bench.plots: {error}", file=sys.stderr)
        return 2
    print("\n".join(map(str, written)))
    return 0


def plot_folder(folder: Path) -> list[Path]:
    """The PNGs written, beside their reports.

    Raises:
        UserError: there is neither report.
    """
    written = []
    if not any((folder / report).exists() for report in (KERNELS, SCALING)):
        raise UserError(f"{folder}: has neither {KERNELS} nor {SCALING}; measure one with --out {folder}")
    if (folder / KERNELS).exists():
        report = load_kernels(folder)
        if not report["cases"]:
            raise UserError(f"{folder / KERNELS}: no case was measured; measure again")
        for picture, draw in PICTURES.items():
            written.append(folder / f"{picture}.png")
            plot_cases(report, picture, draw).savefig(written[-1], dpi=DPI)
    if (folder / SCALING).exists():
        written.append(folder / "scaling.png")
        plot_scaling(load(folder, SCALING)).savefig(written[-1], dpi=DPI)
    return written


def plot_cases(report: dict, picture: str, draw: Callable[[Axes, dict], None]) -> Figure:
    cases = report["cases"]
    most = max(len(case["providers"]) for case in cases)
    figure, panels = grid(len(cases), 0.27 * most + 1.0)
    for axes, case in zip(panels, cases):
        draw(axes, case)
        axes.set_title(panel_title(case), loc="left", fontsize=9, fontweight="bold", color=INK)
    figure.suptitle(TITLES[picture], x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    caption(figure, report)
    return figure


def panel_title(case: dict) -> str:
    task, rest = name(case).split(", N ", 1)
    return f"{task}\nN {rest}"


def grid(panels: int, height: float) -> tuple[Figure, list[Axes]]:
    """Two panels beside each other; what is over is left out."""
    columns = min(2, panels)
    rows = math.ceil(panels / columns)
    figure = Figure(figsize=(6.6 * columns, height * rows + 0.7), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in axes[panels:]:
        spare.remove()
    return figure, axes[:panels]


def caption(figure: Figure, report: dict):
    words = f"{report['date']}, {facts(report['machine'])}"
    figure.supxlabel(words, x=0.01, ha="left", fontsize=7, color=BASE)


# Bars.


def draw_time(axes: Axes, case: dict):
    if any("time_ratio" in found for found in measured(case).values()):
        draw_bars(axes, case, "time_ratio", lambda found: f"{found['time_ratio']:.2f}×  {seconds(found['seconds'])}")
        mark_eager(axes, "time, as a multiple of eager's")
    else:  # where eager does not fit, there is no ratio
        draw_bars(axes, case, "seconds", lambda found: seconds(found["seconds"]))
        axes.set_xlabel("seconds; eager did not run", fontsize=8, color=INK)


def draw_memory(axes: Axes, case: dict):
    draw_bars(axes, case, "peak_extra_mib", memory_label)
    axes.set_xlabel("peak memory beyond the inputs, MiB", fontsize=8, color=INK)


def memory_label(found: dict) -> str:
    size = mib(found["peak_extra_mib"])
    return f"{size}  {found['memory_ratio']:.2f}×" if "memory_ratio" in found else size


def draw_roof(axes: Axes, case: dict):
    draw_bars(axes, case, "share_of_roof", lambda found: f"{found['share_of_roof']:.0%}")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("of the roof measured in the same run", fontsize=8, color=INK)


def mark_eager(axes: Axes, label: str):
    axes.axvline(1, color=BASE, lw=1, ls=(0, (4, 3)), zorder=1)
    axes.set_xlabel(label, fontsize=8, color=INK)


def draw_bars(axes: Axes, case: dict, what: str, label: Callable[[dict], str]):
    """A provider a bar, in the order of the report."""
    providers, failures = case["providers"], failed(case)
    values = [found[what] for found in measured(case).values() if what in found]
    widest = max(values, default=1.0)
    for row, (provider, found) in enumerate(providers.items()):
        if provider in failures:
            write(axes, 0, row, f"failed: {shortened(failures[provider])}", "#a03030", size=6.5)
        elif what not in found:
            write(axes, 0, row, "not measured", BASE)
        else:
            axes.barh(row, found[what], height=0.72, color=colour(provider), zorder=2)
            write(axes, found[what], row, label(found), INK)
    axes.set_yticks(range(len(providers)), list(providers))
    for tick, provider in zip(axes.get_yticklabels(), providers):
        tick.set(color=OURS if is_ours(provider) else INK, fontweight="bold" if is_ours(provider) else "normal")
    axes.set_ylim(len(providers) - 0.4, -0.6)
    axes.set_xlim(0, 1.32 * widest)  # with room for the labels
    dress(axes, "x")
    axes.tick_params(axis="y", length=0)


def write(axes: Axes, x: float, y: float, words: str, ink: str, size: float = 7.5):
    axes.annotate(
        words, (x, y), xytext=(3, 0), textcoords="offset points", va="center", fontsize=size, color=ink,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
    )  # fmt: skip


def shortened(error: str) -> str:
    return error if len(error) <= REASON else error[: REASON - 1] + "…"


def colour(provider: str) -> str:
    return OURS if is_ours(provider) else BASE if provider == EAGER else PEER


def dress(axes: Axes, grid_axis: str):
    axes.grid(axis=grid_axis, color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9a9ea5")
    axes.tick_params(colors=INK, labelsize=8)


# Accuracy.


def draw_accuracy(axes: Axes, case: dict):
    points = {provider: (found["seconds"], worst_error(found)) for provider, found in measured(case).items()}
    points = {provider: point for provider, point in points.items() if point[1] is not None}
    wrong = [provider for provider, (_, error) in points.items() if not math.isfinite(error)]
    drawn = {provider: (x, max(y, 1e-17)) for provider, (x, y) in points.items() if provider not in wrong}
    for provider, (x, y) in drawn.items():
        axes.scatter(x, y, s=42, color=colour(provider), edgecolor="white", lw=0.8, zorder=3)
    axes.set(xscale="log", yscale="log")
    dress(axes, "both")
    axes.margins(x=0.12, y=0.15)
    axes.set_xlabel("seconds", fontsize=8, color=INK)
    axes.set_ylabel("largest error against float64", fontsize=8, color=INK)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    name_points(axes, drawn)
    missing = [f"{provider}: not finite" for provider in wrong] + [f"{provider}: failed" for provider in failed(case)]
    axes.text(
        0, -0.24, "; ".join(missing), transform=axes.transAxes, fontsize=6.5, color="#a03030", va="top", wrap=True
    )


def worst_error(found: dict) -> float | None:
    """Of gradients, which are relative, or, where there are none, of log-prob and entropy in nats."""
    errors = found.get("errors", {})
    gradients = [error for what, error in errors.items() if what.startswith("d_")]
    values = gradients or list(errors.values())
    return next((value for value in values if not math.isfinite(value)), max(values, default=None))


def name_points(axes: Axes, points: dict[str, tuple[float, float]]):
    """At the right, in the order of the errors, with a thin line to the point: names of near points stay apart."""
    low, high = (math.log(limit) for limit in axes.get_ylim())
    heights, last = {}, -math.inf
    for provider, (_, y) in sorted(points.items(), key=lambda item: item[1][1]):
        last = heights[provider] = max((math.log(y) - low) / (high - low), last + LABEL_GAP)
    lift = max(0.0, last - 1.0)
    for provider, (x, y) in points.items():
        axes.annotate(
            provider, (x, y), xytext=(1.03, heights[provider] - lift), textcoords="axes fraction", va="center",
            fontsize=7.5, color=OURS if is_ours(provider) else INK, fontweight="bold" if is_ours(provider) else "normal",
            arrowprops={"arrowstyle": "-", "lw": 0.5, "color": "#9a9ea5", "shrinkB": 3, "relpos": (0, 0.5)},
            annotation_clip=False,
        )  # fmt: skip


PICTURES = {"time": draw_time, "memory": draw_memory, "roof": draw_roof, "accuracy": draw_accuracy}
TITLES = {
    "time": "Time beside eager (shorter is better)",
    "memory": "Memory (shorter is better)",
    "roof": "Share of the roof (longer is better)",
    "accuracy": "Error and time (lower left is better)",
}


# Growth.


def plot_scaling(report: dict) -> Figure:
    """Time and memory by each axis, log-log, each line's exponent beside its name."""
    axes_names = list(dict.fromkeys(case["axis"] for case in report["cases"]))
    figure, panels = grid(2 * len(axes_names), 3.3)
    for row, axis in enumerate(axes_names):
        cases = [case for case in report["cases"] if case["axis"] == axis]
        for panel, what, label in zip(panels[2 * row :], ("seconds", "peak_extra_mib"), ("seconds", "MiB")):
            draw_growth(panel, cases, axis, what, report["slopes"])
            panel.set_ylabel(label, fontsize=8, color=INK)
    figure.suptitle(
        "Growth: slope in log-log beside each name", x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK
    )
    caption(figure, report)
    return figure


def draw_growth(axes: Axes, cases: list[dict], axis: str, what: str, slopes: dict):
    sizes = sorted({case["size"] for case in cases})
    for place, provider in enumerate(slopes):  # the same colour on every axis
        found = [
            (case["size"], case["providers"][provider].get(what)) for case in cases if provider in case["providers"]
        ]
        points = sorted((size, value) for size, value in found if value)
        slope = slopes.get(provider, {}).get(axis, {}).get(what)
        if points:
            label = provider if slope is None else f"{provider}  {slope:.2f}"
            style = {"color": LINES[place % len(LINES)], "marker": MARKERS[place % len(MARKERS)]}
            axes.plot(*zip(*points), label=label, lw=1.6, ms=4.5, **style)
    axes.set(xscale="log", yscale="log")
    dress(axes, "both")
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    fixed = ", ".join(f"{part.upper()} {cases[0][part]:,}" for part in ("n", "d", "v") if part != axis)
    axes.set_title(f"by {axis if axis == 'ranks' else axis.upper()}; {fixed}", loc="left", fontsize=9, color=INK)
    axes.legend(fontsize=7.5, frameon=False, labelcolor=INK, loc="center left", bbox_to_anchor=(1.0, 0.5))


if __name__ == "__main__":
    sys.exit(main())
