"""Verdicts on claims, against differences worked out by hand."""

import pytest
from pydantic import ValidationError
from study_runs import study_results

from bench.study.claims import Claim
from bench.study.verdicts import verdict


def decide(folder, arms, *, budget=16.0, ends=None, thresholds=(), **claim):
    claim = {"text": "x", "higher": "a", "lower": "b"} | claim
    results = study_results(folder, arms, claims=[claim], budget=budget, ends=ends, thresholds=thresholds)
    return verdict(results.claims[0], results)


def finals(*values):
    return [[0.1, 0.2, value] for value in values]


def test_a_difference_whose_interval_is_above_zero_holds(tmp_path):
    """Differences 4, 5 and 6 points: mean 5, s = 1, half = 4.302653 / sqrt(3) = 2.484."""
    found = decide(tmp_path, {"a": finals(0.54, 0.65, 0.76), "b": finals(0.5, 0.6, 0.7)})
    assert found.word == "holds"
    assert found.evidence == "+5.0 points, 95 % interval 2.5 to 7.5, 3 seeds"


def test_the_opposite_does_not_hold_and_an_interval_with_zero_is_inconclusive(tmp_path):
    found = decide(tmp_path / "1", {"a": finals(0.5, 0.6, 0.7), "b": finals(0.54, 0.65, 0.76)})
    assert found.word == "does not hold" and found.evidence.startswith("−5.0 points, 95 % interval −7.5 to −2.5")
    found = decide(tmp_path / "2", {"a": finals(0.5, 0.6, 0.7), "b": finals(0.4, 0.65, 0.7)})
    assert found.word == "inconclusive"
    found = decide(tmp_path / "4", {"a": finals(0.4, 0.65, 0.7), "b": finals(0.5, 0.6, 0.7)})
    assert found.word == "inconclusive" and found.evidence.startswith("−1.7 points")
    found = decide(tmp_path / "3", {"a": finals(0.5, 0.6), "b": finals(0.5, 0.6)})
    assert found.word == "inconclusive"  # no difference at all


@pytest.mark.parametrize("by, word", [(0.02, "holds"), (0.03, "inconclusive"), (0.08, "does not hold")])
def test_a_minimal_difference(tmp_path, by, word):
    found = decide(tmp_path, {"a": finals(0.54, 0.65, 0.76), "b": finals(0.5, 0.6, 0.7)}, by=by)
    assert found.word == word and f"required is more than +{100 * by:.1f}" in found.evidence


def test_non_inferiority(tmp_path):
    """Differences -1, 0 and 1 points: the interval reaches to -2.5."""
    arms = {"a": finals(0.49, 0.6, 0.71), "b": finals(0.5, 0.6, 0.7)}
    assert decide(tmp_path / "1", arms, by=-0.03).word == "holds"
    assert decide(tmp_path / "2", arms, by=-0.02).word == "inconclusive"


def test_one_seed_is_inconclusive(tmp_path):
    found = decide(tmp_path, {"a": finals(0.9), "b": finals(0.1)})
    assert found.word == "inconclusive" and "one seed, so no interval" in found.evidence


def test_best_and_mean_over_the_run(tmp_path):
    arms = {"a": [[0.1, 0.8, 0.3], [0.1, 0.8, 0.3]], "b": [[0.1, 0.2, 0.4], [0.1, 0.21, 0.4]]}
    assert decide(tmp_path / "1", arms).word == "does not hold"
    assert decide(tmp_path / "2", arms, at="best").evidence.startswith("+40.0 points")
    assert decide(tmp_path / "3", arms, at="auc").evidence.startswith("+27.2 points")  # .5 - (.225 + .23) / 2


def test_other_series_at_the_end(tmp_path):
    results = study_results(
        tmp_path,
        {"a": [[0.1, 0.2], [0.1, 0.2]], "b": [[0.1, 0.2], [0.1, 0.2]]},
        claims=[{"text": "x", "metric": "policy/entropy", "higher": "a", "lower": "b"}],
        policy__entropy=[0.9, 0.25],
    )
    assert verdict(results.claims[0], results).evidence.startswith("+0 policy/entropy, 95 % interval 0 to 0")


def collapse(count, of):
    return [[0.1, 0.6, 0.2]] * count + [[0.1, 0.2, 0.3]] * (of - count)


def test_collapses_by_fishers_test(tmp_path):
    found = decide(tmp_path / "1", {"a": collapse(5, 5), "b": collapse(0, 5)}, at="collapsed")
    assert found.word == "holds"
    assert found.evidence == "a 5 of 5 runs, b 0 of 5; Fisher's exact test, p = 0.0079"
    found = decide(tmp_path / "2", {"a": collapse(0, 5), "b": collapse(5, 5)}, at="collapsed")
    assert found.word == "does not hold"
    found = decide(tmp_path / "3", {"a": collapse(3, 5), "b": collapse(0, 5)}, at="collapsed")
    assert found.word == "inconclusive"
    ends = {("a", seed): "diverged" for seed in range(5)}
    found = decide(tmp_path / "4", {"a": collapse(0, 5), "b": collapse(0, 5)}, at="collapsed", ends=ends)
    assert found.word == "holds"


FAST, SLOW, NEVER = [0.1, 0.6, 0.6, 0.6], [0.1, 0.2, 0.3, 0.6], [0.1, 0.2, 0.3, 0.4]


def test_costs_to_a_threshold(tmp_path):
    """8 updates against 24, every seed."""
    found = decide(
        tmp_path, {"a": [SLOW] * 3, "b": [FAST] * 3}, at="updates_to", threshold=0.5, thresholds=[0.5], budget=24
    )
    assert found.word == "holds" and found.evidence.startswith("+16 updates to 50%, 95 % interval 16 to 16, 3 seeds")


@pytest.mark.parametrize(
    "higher, lower, word",
    [
        (NEVER, FAST, "holds"),  # its cost is higher still
        (FAST, NEVER, "does not hold"),
        (NEVER, NEVER, "inconclusive"),
    ],
)
def test_a_threshold_that_is_never_reached_costs_the_whole_run_at_least(tmp_path, higher, lower, word):
    found = decide(
        tmp_path, {"a": [higher] * 3, "b": [lower] * 3}, at="rollouts_to", threshold=0.5, thresholds=[0.5], budget=24
    )
    assert found.word == word and "not reached by" in found.evidence


def test_a_bound_does_not_decide_against_itself(tmp_path):
    """One arm reached it after 32 updates; the other ended at 16 without reaching it, so its cost may be higher."""
    late, short = [[0.1, 0.2, 0.3, 0.3, 0.6]] * 3, [[0.1, 0.2, 0.3]] * 3
    keys = {"at": "updates_to", "threshold": 0.5, "thresholds": [0.5], "budget": 32}
    found = decide(tmp_path / "1", {"a": short, "b": late}, **keys)
    assert found.evidence.startswith("−16 updates") and found.word == "inconclusive"
    found = decide(tmp_path / "2", {"a": late, "b": short}, **keys)
    assert found.evidence.startswith("+16 updates") and found.word == "inconclusive"


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"metric": "policy/entrpy"}, "did you mean policy/entropy"),
        ({"at": "updates_to"}, "threshold goes with"),
        ({"threshold": 0.5}, "threshold goes with"),
        ({"at": "best", "metric": "policy/entropy"}, "leave metric out"),
        ({"at": "collapsed", "by": 0.1}, "leave `by` out"),
        ({"lower": "a"}, "with itself"),
    ],
)
def test_an_invalid_claim_is_refused(keys, words):
    with pytest.raises(ValidationError, match=words):
        Claim(**{"text": "x", "higher": "a", "lower": "b"} | keys)
