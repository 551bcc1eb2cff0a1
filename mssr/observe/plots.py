"""Draws the curves of one run, or of several runs in the same panels, as one PNG."""

import math
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: it keeps every figure and sets a backend for the process
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from mssr.errors import UserError
from mssr.observe.metrics import read_metrics
from mssr.observe.picture import refuse_other_file, save_picture

COLOURS = ("#2f6db5", "#e07b39", "#3a9e6f", "#b5479b", "#c9a227", "#5c5f66", "#3fb3c4", "#d1495b")
INK = "#33363b"
EMPTY = -1

Points = tuple[list[int], list[float]]


@dataclass(frozen=True)
class Series:
    """One metric in a panel. style: `line`, `smooth` (raw values faint behind it) or `markers` (rarely measured)."""

    key: str
    label: str
    style: str = "line"


@dataclass(frozen=True)
class Panel:
    title: str
    y_label: str
    series: tuple[Series, ...]
    log: bool = False
    slots: int = 1  # width, in cells of the grid


TRAINING = Series("train/correct", "training accuracy", "smooth")
VALIDATION = Series("val/accuracy", "validation accuracy", "markers")
PANELS = (
    Panel("Accuracy", "share of problems", (TRAINING, VALIDATION), slots=2),
    Panel(
        "Policy entropy",
        "nats / token",
        (Series("policy/entropy", "exact"), Series("policy/entropy_proxy", "sampled-token proxy")),
    ),
    Panel("Response length", "tokens", (Series("rollout/response_tokens", "mean", "smooth"),)),
    Panel("Clip fraction", "share of tokens", (Series("policy/clip_fraction", "clipped", "smooth"),)),
    Panel("Gradient norm", "global L2 norm before clipping", (Series("train/grad_norm", "norm", "smooth"),)),
    Panel(
        "Rollout / trainer gap",
        "mean |Δ log-prob| (nats)",
        (Series("rollout/logp_gap_mean", "gap", "smooth"),),
        log=True,
    ),
    Panel("Value tracker", "share of problems", (TRAINING, Series("tracker/value_mean", "tracker's mean value"))),
    Panel("Supervised loss", "nats / token", (Series("sft/loss", "loss", "smooth"),)),
)
SUM = Series("train/reward", "sum, weighted", "smooth")
PART = "reward/"
FAILURES = ("reward/errors", "reward/timeouts")


def plot_curves(runs: dict[str, Path], out: Path) -> Path:
    """Draw the curves of `runs` (label -> metrics.jsonl) into the PNG `out`. Panels without data are left out.

    One run: one colour per metric. Several: one colour per run; metrics in the same panel differ in line style.

    Raises:
        UserError: a metrics file is missing or has nothing to plot, or `out` is a file that this did not draw.
    """
    out = Path(out)
    refuse_other_file(out)
    curves = {label: _read_curves(path) for label, path in runs.items()}
    drawn = (*PANELS, *_reward_panel(curves))
    panels = [panel for panel in drawn if any(s.key in run for s in panel.series for run in curves.values())]
    figure = Figure(layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    for panel, axes in zip(panels, _axes(figure, panels), strict=True):
        _draw_panel(axes, panel, curves)
    if len(curves) > 1:
        handles = [Line2D([], [], color=_colour(index), lw=2.5) for index in range(len(curves))]
        figure.legend(handles, list(curves), loc="outside upper center", ncols=min(len(curves), 6), frameon=False)
    else:
        figure.suptitle(next(iter(curves)), color=INK, fontsize=13)
    return save_picture(figure, out, dpi=150)


def _reward_panel(curves: dict[str, dict[str, Points]]) -> list[Panel]:
    """Return a panel with the reward and its parts, if it has several."""
    parts = sorted({key for run in curves.values() for key in run if key.startswith(PART)})
    if len(parts) < 2:
        return []
    series = [Series(key, key.removeprefix(PART), "smooth") for key in parts]
    return [Panel("Reward", "mean over the step", (SUM, *series))]


def _read_curves(path: Path) -> dict[str, Points]:
    """Return steps and finite values of each metric that a panel shows."""
    known = {SUM.key, *(series.key for panel in PANELS for series in panel.series)}
    curves: dict[str, Points] = {}
    for record in read_metrics(path):
        for key in {key for key in record if key in known or (key.startswith(PART) and key not in FAILURES)}:
            if math.isfinite(record[key]):
                steps, values = curves.setdefault(key, ([], []))
                steps.append(record["step"])
                values.append(record[key])
    if not curves:
        raise UserError(f"{path}: nothing to plot: no step has been recorded yet")
    return curves


def _axes(figure: Figure, panels: list[Panel]) -> list[Axes]:
    """Return each panel's axes, in a grid of two rows (one for up to three cells)."""
    cells = [number for number, panel in enumerate(panels) for _ in range(panel.slots)]
    rows = 1 if len(cells) <= 3 else 2
    columns = math.ceil(len(cells) / rows)
    cells += [EMPTY] * (rows * columns - len(cells))
    figure.set_size_inches(max(3.8 * columns, 5.5), 3.2 * rows + 0.5)
    grid = [cells[row * columns : (row + 1) * columns] for row in range(rows)]
    axes = figure.subplot_mosaic(grid, empty_sentinel=EMPTY)
    return [axes[number] for number in range(len(panels))]


def _draw_panel(axes: Axes, panel: Panel, curves: dict[str, dict[str, Points]]) -> None:
    drawn = [series for series in panel.series if any(series.key in run for run in curves.values())]
    several = len(curves) > 1
    for run_index, run in enumerate(curves.values()):
        for series_index, series in enumerate(drawn):
            if series.key in run:
                colour = _colour(run_index if several else series_index)
                _draw_series(axes, series, run[series.key], colour, "--" if several and series_index else "-")
    if panel.log and any(value > 0 for line in axes.lines for value in line.get_ydata()):  # an exact gap is 0
        axes.set_yscale("log", nonpositive="mask")
    axes.set_title(panel.title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel(panel.y_label, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.grid(color="#e3e5e8", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9a9ea5")
    axes.tick_params(colors=INK, labelsize=9)
    if len(drawn) > 1:
        axes.legend(handles=_legend(drawn, several), fontsize=8.5, frameon=False, labelcolor=INK)


def _draw_series(axes: Axes, series: Series, points: Points, colour: str, line: str) -> None:
    steps, values = points
    marker = "o" if series.style == "markers" or len(steps) < 3 else ""  # a line through one point is invisible
    if series.style == "smooth":
        axes.plot(steps, values, color=colour, lw=0.9, alpha=0.3)
        values = _smooth(values)
    axes.plot(steps, values, color=colour, lw=1.8, ls=line, marker=marker, ms=4)


def _legend(drawn: list[Series], several: bool) -> list[Line2D]:
    return [
        Line2D(
            [], [], label=series.label, lw=1.8, ms=4,
            color="#7b7f86" if several else _colour(index),
            ls="--" if several and index else "-",
            marker="o" if series.style == "markers" else "",
        )
        for index, series in enumerate(drawn)
    ]  # fmt: skip


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _smooth(values: list[float]) -> list[float]:
    """Exponential moving average over about a tenth of the run, corrected for its zero start."""
    span = min(max(len(values) / 10, 1.0), 25.0)
    keep = 1 - 2 / (span + 1)
    total = weight = 0.0
    smoothed = []
    for value in values:
        total = keep * total + value
        weight = keep * weight + 1
        smoothed.append(total / weight)
    return smoothed
