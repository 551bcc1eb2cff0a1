"""Intervals, against numbers worked out by hand and scipy."""

import numpy as np
import pytest
from scipy import stats

from bench.study.statistics import mean_interval, paired_difference, share_p_value


def test_a_t_interval_worked_by_hand():
    """1, 2, 3, 4, 5: mean 3, s = sqrt(2.5), t(0.975; 4) = 2.776445: half = 2.776445 * sqrt(0.5) = 1.963243."""
    found = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found.mean, found.n) == (3.0, 5)
    assert found.low == pytest.approx(3 - 1.963243, abs=1e-6) and found.high == pytest.approx(3 + 1.963243, abs=1e-6)


@pytest.mark.parametrize("n", [2, 3, 9, 40])
def test_the_same_as_scipy(n):
    values = np.random.default_rng(n).normal(0.4, 0.1, n)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    found = mean_interval(values.tolist())
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_one_value_has_no_interval():
    found = mean_interval([0.25])
    assert (found.mean, found.low, found.high, found.n) == (0.25, None, None, 1)
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])


def test_equal_values_have_an_interval_of_width_0():
    found = mean_interval([0.5, 0.5, 0.5])
    assert (found.low, found.high) == (0.5, 0.5)


def test_a_paired_difference_takes_common_seeds_and_cancels_what_they_share():
    """Seeds differ by 20 points, arms by 1, 2 and 3: mean 2, s = 1, t(0.975; 2) = 4.302653: half = 2.484138."""
    base = {0: 10.0, 1: 30.0, 2: 50.0, 7: 0.0}
    better = {2: 53.0, 0: 11.0, 1: 32.0, 9: 99.0}
    found = paired_difference(better, base)
    assert (found.mean, found.n) == (2.0, 3)
    assert found.low == pytest.approx(2 - 2.484138, abs=1e-6) and found.high == pytest.approx(2 + 2.484138, abs=1e-6)
    test = stats.ttest_rel([11.0, 32.0, 53.0], [10.0, 30.0, 50.0]).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((test.low, test.high), abs=1e-12)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_shares_by_fishers_exact_test():
    """5 of 5 against 0 of 5: two of the C(10, 5) = 252 tables are as extreme. 3 of 5 against 0 of 5: not significant."""
    assert share_p_value(5, 5, 0, 5) == pytest.approx(2 / 252)
    assert share_p_value(3, 5, 0, 5) == pytest.approx(1 / 6)
    assert share_p_value(0, 5, 0, 5) == pytest.approx(1.0)
