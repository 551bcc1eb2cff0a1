"""A study's figures: curves of its arms with bands over the seeds, and the arms side by side."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from bench.study.curves import band
from bench.study.recorded import ACCURACY, Match
from bench.study.results import StudyResults
from bench.study.summary import ArmSummary, summarise
from mssr.observe.plots import COLOURS, INK

GRID = "#e3e5e8"
FRAME = "#9a9ea5"
MUTED = "#7b7f86"
DPI = 130
SMOOTHED = 0.06  # share of a run that the moving mean of noisy series covers
WIDE_RANGE = 30.0  # ratio of values from which a scale is logarithmic
AXIS_LABELS: dict[Match, str] = {
    "updates": "optimiser updates",
    "rollouts": "rollouts",
    "tokens": "generated tokens",
    "seconds": "seconds of training",
}


@dataclass(frozen=True)
class Panel:
    """key: a recorded series. smooth: by a moving mean. share: a percentage. log: logarithmic if the range is wide."""

    title: str
    y_label: str
    key: str
    smooth: bool = True
    share: bool = False
    log: bool = False


SMALL_PANELS = (
    Panel("Training reward", "mean over the step", "train/reward"),
    Panel("Policy entropy, exact", "nats / token", "policy/entropy"),
    Panel("Policy entropy, sampled-token proxy", "nats / token", "policy/entropy_proxy"),
    Panel("Gradient norm before clipping", "global L2 norm", "train/grad_norm", log=True),
    Panel("Clip fraction", "share of tokens", "policy/clip_fraction", share=True),
)
VALIDATION = Panel("Validation accuracy", "held-out problems", ACCURACY, smooth=False, share=True)


def plot_curves(results: StudyResults, out: Path) -> Path:
    """Write the PNG `out`: for every arm the mean over the seeds, and a band from the lowest seed to the highest.

    Panels: validation accuracy by updates, and by rollouts, or by tokens or seconds if these are matched; by updates the
    training reward, both entropies, gradient norm and clip fraction; the calibration of value trackers. Panels without data
    are left out.
    """
    arms = results.arms_with_runs
    drawn: list[Callable[[Axes], None]] = [
        lambda axes, panel=panel: _draw_series(axes, panel, "updates", results)
        for panel in SMALL_PANELS
        if any(panel.key in run.means for run in results.runs)
    ]
    if any(run.bins for run in results.runs):
        drawn.append(lambda axes: _draw_calibration(axes, results))
    rows = 1 + math.ceil(len(drawn) / 3)
    figure = _figure(13.2, 3.5 * rows + 0.9, arms)
    grid = figure.add_gridspec(rows, 6, height_ratios=[1.25, *[1.0] * (rows - 1)])
    for half, axis in enumerate(("updates", "rollouts" if results.match == "updates" else results.match)):
        _draw_series(figure.add_subplot(grid[0, 3 * half : 3 * half + 3]), VALIDATION, axis, results)
    for place, draw in enumerate(drawn):
        row, column = divmod(place, 3)
        draw(figure.add_subplot(grid[1 + row, 2 * column : 2 * column + 2]))
    return _save(figure, out)


def plot_arms(results: StudyResults, out: Path) -> Path:
    """Write the PNG `out`, which compares the arms.

    Panels: final accuracy (points: seeds; bar: mean and 95 % interval), its paired difference to the first arm, and the costs
    as multiples of the first arm's.
    """
    summaries = summarise(results)
    figure = _figure(13.2, 0.38 * len(summaries) + 1.9)
    final, difference, cost = figure.subplots(1, 3, sharey=True)
    _draw_finals(final, summaries, results)
    _draw_differences(difference, summaries, list(results.arms))
    _draw_costs(cost, summaries)
    final.set_yticks(range(len(summaries)), [summary.arm for summary in summaries])
    final.set_ylim(len(summaries) - 0.5, -0.5)  # the first arm on top
    for axes in (final, difference, cost):
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="y", visible=False)
    return _save(figure, out)


def _draw_series(axes: Axes, panel: Panel, axis: Match, results: StudyResults) -> None:
    heights = []
    for index, arm in enumerate(results.arms):
        runs = results.of_arm(arm)
        points = [
            results.accuracy_curve(run, axis) if panel.key == ACCURACY else run.curves.points(panel.key, axis)
            for run in runs
        ]
        if panel.smooth:
            points = [(x, _moving_mean(y)) for x, y in points]
        seeds = band(points, [run.end == "diverged" for run in runs])
        if seeds is None:
            continue
        colour, dashes = _style(index)
        axes.fill_between(seeds.x, seeds.low, seeds.high, color=colour, alpha=0.13, lw=0)
        marker = "o" if len(seeds.x) < 3 else ""  # a line of one point cannot be seen
        axes.plot(seeds.x, seeds.mean, color=colour, ls=dashes, lw=1.9, marker=marker, ms=4)
        heights += [*seeds.low, *seeds.high]
    title = f"{panel.title}, by {axis}" if panel is VALIDATION else panel.title
    _dress(axes, title, AXIS_LABELS[axis], panel.y_label)
    axes.margins(x=0.01)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    positive = [height for height in heights if height > 0]
    if panel.log and positive and max(positive) > WIDE_RANGE * min(positive):
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif panel.share:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))


def _draw_calibration(axes: Axes, results: StudyResults) -> None:
    """Draw one point per bin: mean prediction and mean reward over all steps and seeds; area: its share of the visits."""
    axes.plot([0, 1], [0, 1], color=MUTED, lw=1, ls=(0, (4, 3)))
    for index, arm in enumerate(results.arms):
        tables = [run.bins for run in results.of_arm(arm) if run.bins]
        if not tables:
            continue
        count, predicted, observed = np.sum(tables, axis=0).T
        seen = count > 0
        x, y = predicted[seen] / count[seen], observed[seen] / count[seen]
        colour, dashes = _style(index)
        axes.plot(x, y, color=colour, ls=dashes, lw=1.2, alpha=0.8)
        axes.scatter(x, y, s=8 + 160 * count[seen] / count.sum(), color=colour, alpha=0.85, lw=0, zorder=3)
    _dress(axes, "Value tracker's calibration", "predicted success", "observed")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))


def _draw_finals(axes: Axes, summaries: Sequence[ArmSummary], results: StudyResults) -> None:
    for row, summary in enumerate(summaries):
        finals = [run.final for run in results.of_arm(summary.arm)]
        colour, _ = _style(list(results.arms).index(summary.arm))
        axes.scatter(finals, [row + 0.24] * len(finals), s=20, color=colour, alpha=0.5, lw=0)
        _draw_estimate(axes, row, summary.final, colour)
    start = np.mean([run.start for run in results.runs])
    axes.axvline(start, color=MUTED, lw=1, ls=(0, (4, 3)))
    axes.annotate(
        "start", (start, 1.0), xycoords=("data", "axes fraction"), xytext=(3, 2), textcoords="offset points",
        fontsize=8, color=MUTED, va="bottom",
    )  # fmt: skip
    _dress(axes, "", "final validation accuracy: seeds, mean, 95 % interval", "")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    left, right = axes.get_xlim()
    axes.set_xlim(max(left, -0.02), min(right, 1.02))  # an interval of few seeds can reach below 0 or above 1


def _draw_differences(axes: Axes, summaries: Sequence[ArmSummary], arms: Sequence[str]) -> None:
    axes.axvline(0, color=MUTED, lw=1)
    for row, summary in enumerate(summaries):
        if summary.difference is not None:
            low, high = summary.difference.low, summary.difference.high
            apart = low is not None and (low > 0 or high < 0)
            colour, _ = _style(arms.index(summary.arm))
            _draw_estimate(axes, row, summary.difference, colour, scale=100, alpha=1.0 if apart else 0.35)
    _dress(axes, "", f"points more than {arms[0]}: paired mean, 95 % interval", "")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}" if value else "0"))


def _draw_costs(axes: Axes, summaries: Sequence[ArmSummary]) -> None:
    first = summaries[0].spent
    kinds = (("updates", "D"), ("rollouts", "o"), ("tokens", "s"), ("seconds", "^"))
    ratios = []
    for index, (name, marker) in enumerate(kinds):
        if first[name] > 0:
            values = [summary.spent[name] / first[name] for summary in summaries]
            rows = [row + 0.13 * (index - 1.5) for row in range(len(summaries))]
            axes.scatter(values, rows, s=26, marker=marker, color=INK, alpha=0.65, lw=0, label=name)
            ratios += values
    axes.axvline(1, color=MUTED, lw=1)
    _dress(axes, "", f"cost, as a multiple of {summaries[0].arm}'s", "")
    positive = [ratio for ratio in ratios if ratio > 0]
    if max(positive) > 3 * min(positive):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.legend(
        fontsize=8, frameon=False, labelcolor=INK, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4,
        handletextpad=0.1, columnspacing=1.0, borderaxespad=0.1,
    )  # fmt: skip


def _draw_estimate(axes: Axes, row: int, estimate, colour: str, scale: float = 1.0, alpha: float = 1.0) -> None:
    if estimate.low is not None:
        ends = [scale * estimate.low, scale * estimate.high]
        axes.plot(ends, [row, row], color=colour, lw=2.2, alpha=alpha, solid_capstyle="round")
    axes.plot(scale * estimate.mean, row, "o", color=colour, ms=6.5, mec="white", mew=1)


def _figure(width: float, height: float, arms: Sequence[str] = ()) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08, wspace=0.03, hspace=0.03)
    if arms:
        handles = [Line2D([], [], color=colour, ls=dashes, lw=2.6) for colour, dashes in map(_style, range(len(arms)))]
        rows = math.ceil(len(arms) / 8)
        figure.legend(
            handles, arms, loc="outside upper center", ncols=math.ceil(len(arms) / rows), frameon=False, fontsize=10,
            labelcolor=INK,
        )  # fmt: skip
    return figure


def _dress(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    if title:
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FRAME)
    axes.tick_params(colors=INK, labelsize=9)


def _style(index: int) -> tuple[str, str]:
    """Return colour and dashes: one colour per arm, then the same colours dashed."""
    return COLOURS[index % len(COLOURS)], ("-", "--", ":", "-.")[index // len(COLOURS) % 4]


def _moving_mean(values: Sequence[float]) -> list[float]:
    """Return means over SMOOTHED of the curve around each point; fewer points at its ends."""
    half = round(SMOOTHED * len(values) / 2)
    return [float(np.mean(values[max(0, place - half) : place + half + 1])) for place in range(len(values))]


def _save(figure: Figure, out: Path) -> Path:
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=DPI)
    return out
