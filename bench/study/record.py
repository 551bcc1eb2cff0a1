"""Writes results.json, table.md and table.json of a study, after every finished run."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.study.grid import PlannedRun
from bench.study.process import read_object, write_whole
from bench.study.results import RESULTS, StudyResults, read_run, write_results
from bench.study.runner import FINISHED
from bench.study.spec import StudySpec
from bench.study.summary import summarise
from bench.study.table import results_table

TABLE = "table.md"


@dataclass(frozen=True)
class Record:
    """path: of the study's file. jobs: of the command line, or None. elapsed: returns the seconds so far."""

    spec: StudySpec
    path: Path
    jobs: int | None
    planned: Sequence[PlannedRun]
    elapsed: Callable[[], float]

    def write(self) -> StudyResults | None:
        """Write the files and return the results; None if no run is finished yet.

        Raises:
            UserError: a run's metrics have no validation accuracy or costs, or its files are damaged.
        """
        finished = [run for run in self.planned if (run.folder / FINISHED).is_file()]
        if not finished:
            return None
        results = self._collect(finished)
        write_results(results, self.spec.out / RESULTS)
        summaries = [asdict(summary) for summary in summarise(results)]
        write_whole(self.spec.out / "table.json", json.dumps(summaries, indent=2) + "\n")
        write_whole(self.spec.out / TABLE, results_table(results))
        return results

    def _collect(self, finished: Sequence[PlannedRun]) -> StudyResults:
        spec = self.spec
        machines = [read_object(run.folder / FINISHED)["machine"] for run in finished]
        return StudyResults(
            name=self.path.stem,
            question=spec.question,
            intro=spec.report_intro,
            match=spec.match,
            budget=spec.budget,
            config=str(spec.config),
            set=spec.set,
            arms=spec.arms,
            seeds=spec.seeds,
            thresholds=spec.thresholds,
            claims=spec.claims,
            command=f"python -m bench.study run {_from_here(self.path)}"
            + (f" --jobs {self.jobs}" if self.jobs else ""),
            jobs=spec.jobs,
            machines=[facts for place, facts in enumerate(machines) if facts not in machines[:place]],
            elapsed_seconds=round(self.elapsed(), 2),
            missing=[run.name for run in self.planned if run not in finished],
            runs=[
                read_run(run.folder, run.arm, run.seed, spec.match, spec.budget, spec.thresholds) for run in finished
            ],
        )


def _from_here(path: Path) -> str:
    """Return the path relative to the current directory, so that reports contain no absolute paths."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name
