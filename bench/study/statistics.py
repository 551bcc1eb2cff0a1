"""Means and paired differences over seeds, with intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """Mean of n values and its 95 % interval, which one value does not have."""

    mean: float
    low: float | None
    high: float | None
    n: int


def mean_interval(values: Sequence[float]) -> Estimate:
    """Return Student's t-interval, mean -+ t(n - 1) * s / sqrt(n).

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("no values")
    n, mean = len(values), fmean(values)
    if n == 1:
        return Estimate(mean, None, None, 1)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * stdev(values) / sqrt(n)
    return Estimate(mean, mean - half, mean + half, n)


def paired_difference(of: Mapping[int, float], to: Mapping[int, float]) -> Estimate | None:
    """Return the mean of `of` - `to` over their common seeds; None if there are none.

    Runs of a seed share warm start, data and order. Their effect on a score cancels, so the interval is narrower than that of
    two independent means.
    """
    common = sorted(of.keys() & to.keys())
    return mean_interval([of[seed] - to[seed] for seed in common]) if common else None


def share_p_value(count: int, of: int, other_count: int, of_other: int) -> float:
    """Return the p-value of Fisher's exact test, two-sided."""
    table = [[count, of - count], [other_count, of_other - other_count]]
    return float(stats.fisher_exact(table).pvalue)
