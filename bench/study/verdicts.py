"""Decides a study's claims by the paired difference of two arms and its interval."""

from dataclasses import dataclass
from typing import Literal

from bench.study.claims import Claim
from bench.study.recorded import ACCURACY
from bench.study.results import RunResult, StudyResults
from bench.study.statistics import Estimate, paired_difference, share_p_value

Word = Literal["holds", "does not hold", "inconclusive"]
LARGEST_P = 0.05


@dataclass(frozen=True)
class Verdict:
    """evidence: the numbers behind the verdict."""

    word: Word
    evidence: str


def verdict(claim: Claim, results: StudyResults) -> Verdict:
    """Return "holds" if the whole interval of `higher` - `lower` is above `by`, "does not hold" if all of it is below."""
    higher, lower = ({run.seed: run for run in results.of_arm(arm)} for arm in (claim.higher, claim.lower))
    if claim.at == "collapsed":
        return _of_shares(claim, list(higher.values()), list(lower.values()))
    if claim.threshold is not None:
        return _of_costs(claim, higher, lower)
    return _of_difference(claim, _scores(claim, higher), _scores(claim, lower))


def _of_difference(claim: Claim, higher: dict[int, float], lower: dict[int, float]) -> Verdict:
    difference = paired_difference(higher, lower)
    if difference is None:
        return Verdict("inconclusive", "no seed has finished in both arms")
    return Verdict(_decide(difference, claim.by), _told(difference, claim))


def _of_costs(claim: Claim, higher: dict[int, RunResult], lower: dict[int, RunResult]) -> Verdict:
    """For a run that did not reach the threshold, use its total cost, which is a lower bound.

    If only `higher` has such runs, the difference is a lower bound; if only `lower` has, an upper bound.
    """
    (high_costs, high_cut), (low_costs, low_cut) = _costs_to(claim, higher), _costs_to(claim, lower)
    found = _of_difference(claim, high_costs, low_costs)
    undecided = (found.word == "holds" and low_cut) or (found.word == "does not hold" and high_cut)
    cut = [f"{count} runs of {arm}" for arm, count in ((claim.higher, high_cut), (claim.lower, low_cut)) if count]
    more = f"; not reached by {', '.join(cut)}, whose total cost is taken as a lower bound" if cut else ""
    return Verdict("inconclusive" if undecided else found.word, found.evidence + more)


def _of_shares(claim: Claim, higher: list[RunResult], lower: list[RunResult]) -> Verdict:
    """Compare shares by Fisher's exact test: a t-interval is not valid for yes/no outcomes of a few seeds."""
    if not higher or not lower:
        return Verdict("inconclusive", "an arm has no finished run")
    counts = [(sum(run.collapsed for run in runs), len(runs)) for runs in (higher, lower)]
    (high, of_high), (low, of_low) = counts
    p = share_p_value(high, of_high, low, of_low)
    word: Word = "inconclusive"
    if p < LARGEST_P:
        word = "holds" if high / of_high > low / of_low else "does not hold"
    evidence = (
        f"{claim.higher} {high} of {of_high} runs, {claim.lower} {low} of {of_low}; Fisher's exact test, p = {p:.2g}"
    )
    return Verdict(word, evidence)


def _decide(difference: Estimate, by: float) -> Word:
    if difference.low is not None and difference.low > by:
        return "holds"
    if difference.high is not None and difference.high < by:
        return "does not hold"
    return "inconclusive"


def _scores(claim: Claim, runs: dict[int, RunResult]) -> dict[int, float]:
    if claim.metric == ACCURACY:
        return {seed: getattr(run, claim.at) for seed, run in runs.items()}
    values = {seed: run.ends if claim.at == "final" else run.means for seed, run in runs.items()}
    return {seed: means[claim.metric] for seed, means in values.items() if claim.metric in means}


def _costs_to(claim: Claim, runs: dict[int, RunResult]) -> tuple[dict[int, float], int]:
    """Return costs by seed, and how many runs did not reach the threshold."""
    name = claim.at.removesuffix("_to")
    costs, cut = {}, 0
    for seed, run in runs.items():
        found = [reached.spent for reached in run.reached if reached.threshold == claim.threshold]
        cut += not found
        costs[seed] = (found[0] if found else run.spent)[name]
    return costs, cut


def _told(difference: Estimate, claim: Claim) -> str:
    if claim.threshold is not None:
        unit, scale, digits = f" {claim.at.removesuffix('_to')} to {claim.threshold:.0%}", 1.0, ",.0f"
    elif claim.metric == ACCURACY:
        unit, scale, digits = " points", 100.0, ".1f"
    else:
        unit, scale, digits = f" {claim.metric}", 1.0, ".3g"

    def number(value: float, sign: str = "") -> str:
        return format(scale * value, sign + digits).replace("-", "−")

    asked = f", required is more than {number(claim.by, '+')}" if claim.by else ""
    if difference.low is None:
        return f"{number(difference.mean, '+')}{unit}; one seed, so no interval{asked}"
    interval = f"{number(difference.low)} to {number(difference.high)}"
    return f"{number(difference.mean, '+')}{unit}, 95 % interval {interval}, {difference.n} seeds{asked}"
