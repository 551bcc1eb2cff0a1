"""Results of a study's runs as one typed object, results.json."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationError

from bench.study.claims import Claim, Part
from bench.study.curves import Curves, read_curves
from bench.study.process import read_object, write_whole
from bench.study.recorded import ACCURACY, BINS, COSTS, SERIES, Match
from mssr.errors import UserError
from mssr.observe.metrics import FILE_NAME, read_metrics

RESULTS = "results.json"
KEPT_OF_BEST = 0.8  # a run that ends below this share of its best validation has collapsed
LAST_SHARE = 0.1  # share of a run's steps whose mean is the end of a series


class Reached(Part):
    """The first validation at or above a threshold, and what the run had spent by then."""

    threshold: float
    spent: dict[Match, float]


class RunResult(Part):
    """One run.

    end: "budget", or "diverged"; the accuracy of a diverged run counts as 0 from there on, because it leaves no policy.
    start, final, best: validation accuracies. auc: mean accuracy over the matched axis, from 0 on.
    collapsed: diverged, or final below 80 % of best. A run that ends slightly below its start has not collapsed.
    ends, means: means of every series over the last tenth of the steps, and over all steps.
    spent: total costs. bins: `tracker/bins`, summed over the steps.
    """

    arm: str
    seed: int
    end: Literal["budget", "diverged"]
    line: str = ""
    start: float
    final: float
    best: float
    auc: float
    collapsed: bool
    reached: list[Reached]
    ends: dict[str, float]
    means: dict[str, float]
    steps: int
    spent: dict[Match, float]
    wall_seconds: float
    cpu_seconds: float
    bins: list[list[float]] | None
    curves: Curves


class StudyResults(Part):
    """arms: name -> the keys it sets; the others are compared with the first. missing: runs that did not finish.

    jobs: runs at a time. elapsed_seconds: of the commands that ran the study, warm starts included.
    """

    name: str
    question: str
    intro: str
    match: Match
    budget: float
    config: str
    set: dict[str, Any]
    arms: dict[str, dict[str, Any]]
    seeds: list[int]
    thresholds: list[float]
    claims: list[Claim]
    command: str
    jobs: int
    machines: list[dict[str, str]]
    elapsed_seconds: float
    missing: list[str]
    runs: list[RunResult] = Field(min_length=1)

    def of_arm(self, arm: str) -> list[RunResult]:
        return [run for run in self.runs if run.arm == arm]

    def accuracy_curve(self, run: RunResult, axis: Match) -> tuple[list[float], list[float]]:
        """Return the run's validations; those of a diverged run are 0 from there to the end of its budget."""
        x, y = run.curves.points(ACCURACY, axis)
        if run.end == "budget":
            return x, y
        end = run.spent[axis]
        whole = max(self.budget / run.spent[self.match], 1.0) if run.spent[self.match] else 1.0
        return [*x, end, end * whole], [*y, 0.0, 0.0]

    @property
    def arms_with_runs(self) -> list[str]:
        return [arm for arm in self.arms if self.of_arm(arm)]


def read_run(folder: Path, arm: str, seed: int, match: Match, budget: float, thresholds: list[float]) -> RunResult:
    """Read the folder of a finished run: metrics.jsonl and finished.json.

    Raises:
        UserError: its metrics have no validation accuracy, or no costs, or a file is damaged.
    """
    finished = read_object(folder / "finished.json")
    diverged = finished["end"] == "diverged"
    records = read_metrics(folder / FILE_NAME)
    validations = [record for record in records if ACCURACY in record]
    if not validations or COSTS[match] not in records[-1]:
        raise UserError(f"{folder / FILE_NAME}: no {ACCURACY}, or no {COSTS[match]}; run it again with this version")
    spent = {name: records[-1][key] for name, key in COSTS.items()}
    accuracies = [record[ACCURACY] for record in validations]
    points = [(record.get(COSTS[match], 0.0), accuracy) for record, accuracy in zip(validations, accuracies)]
    if diverged:
        points += [(spent[match], 0.0), (max(budget, spent[match]), 0.0)]
    start, final, best = accuracies[0], 0.0 if diverged else accuracies[-1], max(accuracies)
    return RunResult(
        arm=arm,
        seed=seed,
        end=finished["end"],
        line=finished["line"],
        start=start,
        final=final,
        best=best,
        auc=mean_over(points),
        collapsed=diverged or final < KEPT_OF_BEST * best,
        reached=[found for threshold in thresholds if (found := _reached(validations, threshold))],
        ends=_means(records, LAST_SHARE),
        means=_means(records, 1.0),
        steps=int(records[-1]["step"]),
        spent=spent,
        wall_seconds=finished["wall_seconds"],
        cpu_seconds=finished["cpu_seconds"],
        bins=_summed_bins(records),
        curves=read_curves(records),
    )


def mean_over(points: list[tuple[float, float]]) -> float:
    """Return the mean of a curve through points (x, y) over x from 0 on, by trapezoids; it is constant before the first."""
    points = [(0.0, points[0][1]), *points]
    if points[-1][0] == 0:
        return points[-1][1]
    x, y = zip(*points)
    return float(np.trapezoid(y, x)) / x[-1]


def write_results(results: StudyResults, path: Path) -> None:
    write_whole(path, results.model_dump_json() + "\n")


def load_results(path: Path) -> StudyResults:
    """Read a study's folder, or its results.json under any name.

    Raises:
        UserError: it is missing, or was not written by `python -m bench.study run`.
    """
    file = path / RESULTS if path.is_dir() else path
    try:
        return StudyResults.model_validate_json(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{file}: not found; run the study first: python -m bench.study run STUDY.yaml") from None
    except (ValidationError, UnicodeDecodeError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": "not text"}
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{file}: not a study's results: {where + ': ' if where else ''}{first['msg']}") from None


def _reached(validations: list[dict], threshold: float) -> Reached | None:
    for record in validations:
        if record[ACCURACY] >= threshold:
            return Reached(threshold=threshold, spent={name: record.get(key, 0.0) for name, key in COSTS.items()})
    return None


def _means(records: list[dict], share: float) -> dict[str, float]:
    """Return the mean of the last `share` of every series' finite values, at least one value."""
    means = {}
    for key in SERIES:
        values = [record[key] for record in records if key in record and record[key] == record[key]]
        if values:
            last = values[-max(1, round(share * len(values))) :]
            means[key] = sum(last) / len(last)
    return means


def _summed_bins(records: list[dict]) -> list[list[float]] | None:
    tables = [record[BINS] for record in records if BINS in record]
    if not tables:
        return None
    return [[sum(column) for column in zip(*rows)] for rows in zip(*tables)]
