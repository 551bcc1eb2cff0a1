"""An arm's runs in a row of numbers: what the table prints and the plots compare."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

from bench.study.recorded import Match
from bench.study.results import RunResult, StudyResults
from bench.study.statistics import Estimate, mean_interval, paired_difference


@dataclass(frozen=True)
class ReachedBy:
    """Of an arm's runs, `count` reached the threshold; spent: their mean cost by then, None if none did."""

    threshold: float
    count: int
    spent: dict[Match, float] | None


@dataclass(frozen=True)
class ArmSummary:
    """difference: of the final accuracy to the first arm's, paired by seed; None for that arm, and without common seeds.

    collapsed: runs, of `runs`. spent: means of what the runs spent. cpu_seconds, wall_seconds: means, start-up and
    validation included.
    """

    arm: str
    runs: int
    start: Estimate
    final: Estimate
    best: Estimate
    auc: Estimate
    difference: Estimate | None
    collapsed: int
    diverged: int
    reached: list[ReachedBy]
    spent: dict[Match, float]
    cpu_seconds: float
    wall_seconds: float


def summarise(results: StudyResults) -> list[ArmSummary]:
    """In the order of the study's arms; arms without a finished run are left out."""
    first = _by_seed(results, next(iter(results.arms)), lambda run: run.final)
    return [_summary(results, arm, first) for arm in results.arms_with_runs]


def _summary(results: StudyResults, arm: str, first: dict[int, float]) -> ArmSummary:
    runs = results.of_arm(arm)
    is_first = arm == next(iter(results.arms))
    return ArmSummary(
        arm=arm,
        runs=len(runs),
        start=mean_interval([run.start for run in runs]),
        final=mean_interval([run.final for run in runs]),
        best=mean_interval([run.best for run in runs]),
        auc=mean_interval([run.auc for run in runs]),
        difference=None if is_first else paired_difference(_by_seed(results, arm, lambda run: run.final), first),
        collapsed=sum(run.collapsed for run in runs),
        diverged=sum(run.end == "diverged" for run in runs),
        reached=[_reached_by(runs, threshold) for threshold in results.thresholds],
        spent={name: fmean(run.spent[name] for run in runs) for name in runs[0].spent},
        cpu_seconds=fmean(run.cpu_seconds for run in runs),
        wall_seconds=fmean(run.wall_seconds for run in runs),
    )


def _by_seed(results: StudyResults, arm: str, score: Callable[[RunResult], float]) -> dict[int, float]:
    return {run.seed: score(run) for run in results.of_arm(arm)}


def _reached_by(runs: list[RunResult], threshold: float) -> ReachedBy:
    spent = [found.spent for run in runs for found in run.reached if found.threshold == threshold]
    means = {name: fmean(each[name] for each in spent) for name in spent[0]} if spent else None
    return ReachedBy(threshold, len(spent), means)
