"""Summary of an arm's runs, for the table and the plots."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

from bench.study.recorded import Match
from bench.study.results import RunResult, StudyResults
from bench.study.statistics import Estimate, mean_interval, paired_difference


@dataclass(frozen=True)
class ReachedBy:
    """count: how many of an arm's runs reached the threshold. spent: their mean cost by then; None if there are none."""

    threshold: float
    count: int
    spent: dict[Match, float] | None


@dataclass(frozen=True)
class ArmSummary:
    """difference: final accuracy minus that of the first arm, paired by seed; None for that arm, and without common seeds.

    collapsed, diverged: numbers of runs. spent: mean costs. cpu_seconds, wall_seconds: means, with start-up and validation.
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
    """Return summaries in the order of the study's arms, without arms that have no finished run."""
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
