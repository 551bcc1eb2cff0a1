"""A run's series, thinned for plots, and the band of several seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.study.claims import Part
from bench.study.recorded import ACCURACY, COSTS, SERIES, Match

POINTS = 120  # of a series, about
DIGITS = 6  # significant digits


class Curves(Part):
    """A table with about 120 rows: one at every validation, and at some other steps.

    spent[cost][i]: total at row i. series[key][i]: mean of the finite values since the previous row; None if there are none.
    """

    steps: list[int]
    spent: dict[Match, list[float]]
    series: dict[str, list[float | None]]

    def points(self, key: str, axis: Match) -> tuple[list[float], list[float]]:
        """Return x and y of the rows that have the series."""
        values = self.series.get(key, [])
        kept = [row for row, value in enumerate(values) if value is not None]
        return [self.spent[axis][row] for row in kept], [values[row] for row in kept]


@dataclass(frozen=True)
class Band:
    """x: ascending. mean, low, high: mean, minimum and maximum over the seeds; all have the same length."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def read_curves(records: Sequence[dict]) -> Curves:
    """records: the lines of metrics.jsonl."""
    blocks = _blocks(records)
    present = [key for key in SERIES if any(key in record for record in records)]
    return Curves(
        steps=[int(block[-1]["step"]) for block in blocks],
        spent={name: [_short(block[-1].get(key, 0.0)) for block in blocks] for name, key in COSTS.items()},
        series={key: [_mean(block, key) for block in blocks] for key in present},
    )


def band(curves: Sequence[tuple[Sequence[float], Sequence[float]]], cut: Sequence[bool]) -> Band | None:
    """Return the band of the seeds' curves (x, y), interpolated linearly, over the range of x that all of them cover.

    cut: whether the run diverged; its curve counts as far as it goes and does not shorten the band.
    None: there is no common range, or no curve.
    """
    kept = [(np.asarray(x), np.asarray(y), short) for (x, y), short in zip(curves, cut) if len(x)]
    if not kept:
        return None
    ends = [x[-1] for x, _, short in kept if not short] or [max(x[-1] for x, _, _ in kept)]
    first, last = max(x[0] for x, _, _ in kept), min(ends)
    places = np.unique(np.concatenate([x for x, _, _ in kept]))
    places = places[(places >= first) & (places <= last)]
    if not len(places):
        return None
    heights = np.stack([np.interp(places, x, y, right=np.nan) for x, y, _ in kept])
    return Band(places, np.nanmean(heights, 0), np.nanmin(heights, 0), np.nanmax(heights, 0))


def _blocks(records: Sequence[dict]) -> list[list[dict]]:
    """Split after each validation, and after each `stride` records."""
    stride = math.ceil(len(records) / POINTS)
    blocks: list[list[dict]] = [[]]
    for record in records:
        blocks[-1].append(record)
        if ACCURACY in record or len(blocks[-1]) == stride:
            blocks.append([])
    return [block for block in blocks if block]


def _mean(block: list[dict], key: str) -> float | None:
    values = [record[key] for record in block if key in record and math.isfinite(record[key])]
    return _short(sum(values) / len(values)) if values else None


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
