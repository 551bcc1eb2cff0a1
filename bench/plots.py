"""A plot of a report of `bench.kernels`: time and memory of every case, one labelled bar per provider.

    python -m bench.plots FOLDER      # FOLDER/kernels.png from FOLDER/kernels.json; or FILE.json: FILE.png

Ours are blue, eager is dark; a provider without figures says why.
"""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: it keeps every figure and picks a backend for the whole process

from mssr.cli import run_command
from mssr.errors import UserError

from . import arguments as options
from .markdown import mib, seconds
from .report import EAGER, facts, is_ours, load, measured, name, why

PICTURE = "kernels.png"
OURS, PEER, BASE, INK, GRID = "#2f6db5", "#b9bec6", "#5c5f66", "#33363b", "#e3e5e8"
LONGEST = 50  # characters of a reason


def main(words: list[str] | None = None) -> None:
    parser = options.parser(__doc__)
    parser.add_argument(
        "report", type=Path, metavar="WHERE", help="what `bench.kernels --out` got: folder, or FILE.json"
    )
    print(plot(parser.parse_args(words).report))


def plot(where: Path) -> Path:
    """Write the PNG next to its report; return its path.

    Raises:
        UserError: there is no report, or one without cases, or of another benchmark.
    """
    report, picture = load(where), where / PICTURE if where.is_dir() else where.with_suffix(".png")
    if not all("providers" in case for case in report["cases"]):
        raise UserError(f"{where}: not a report of bench.kernels, but of `{report.get('command', 'another command')}`")
    plot_cases(report).savefig(picture, dpi=110)
    return picture


def plot_cases(report: dict) -> Figure:
    """One row per case: time and memory."""
    cases = report["cases"]
    height = 0.27 * max(len(case["providers"]) for case in cases) + 1.0
    figure = Figure(figsize=(13.2, height * len(cases) + 0.7), layout="constrained", facecolor="white")
    for (left, right), case in zip(figure.subplots(len(cases), 2, squeeze=False), cases):
        left.set_title(name(case), loc="left", fontsize=9, fontweight="bold", color=INK)
        if any("time_ratio" in found for found in measured(case).values()):
            draw_bars(left, case, "time_ratio", "time relative to eager (shorter is better)")
        else:
            draw_bars(left, case, "seconds", "seconds; eager did not run")
        draw_bars(right, case, "peak_extra_mib", "peak memory beyond the inputs, MiB (shorter is better)")
    figure.supxlabel(f"{report['date']}, {facts(report)}", x=0.01, ha="left", fontsize=7, color=BASE)
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
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=8)


def label(found: dict, what: str) -> str:
    if "seconds" not in found:
        return why(found)[:LONGEST]
    if what == "peak_extra_mib":
        return mib(found[what]) if what in found else "not measured"
    ratio = f"{found['time_ratio']:.2f}×  " if "time_ratio" in found else ""
    return ratio + seconds(found["seconds"])


if __name__ == "__main__":
    run_command(main)
