"""`python -m bench.study run`: check the file, make the warm starts, run what is not finished, write table and plots."""

import shutil
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

import mssr.environment  # noqa: F401  first: the runs inherit what it sets
from bench.study.grid import as_overrides, expand
from bench.study.plots import plot_arms, plot_curves
from bench.study.process import LOG, append_line, read_lines
from bench.study.record import TABLE, Record
from bench.study.results import StudyResults
from bench.study.runner import Outcome, Runner, signals_raise, sole_user, still_to_run
from bench.study.spec import StudySpec, load_study
from examples.digits.start import DigitsSettings, digits_start
from mssr.distributed import require_device
from mssr.errors import UserError

SESSIONS = "sessions.jsonl"


def study(path: Path, jobs: int | None = None) -> Path:
    """Run the study of a YAML file, or continue it; return the path of its table, `out/table.md`.

    The table, table.json and results.json (which `python -m bench.study report` reads) always cover the runs finished so far;
    curves.png and arms.png are drawn at the end. jobs: overrides that of the file.

    Raises:
        UserError: the file is invalid, and nothing was run; or runs failed, and the others are in the table.
        Interrupted: by a signal; the runs have saved, and the same call continues.
    """
    spec = load_study(path) if jobs is None else load_study(path).with_jobs(jobs)
    for run in expand(spec, path):  # checks all configurations before the warm starts, which take minutes
        require_device(run.config.device)
    console = Console(highlight=False, soft_wrap=True)
    with sole_user(spec.out) as lock, signals_raise(), _timed(spec) as elapsed:
        fixed = _with_fixed_config(spec)
        planned = expand(fixed, path, _starts(fixed, console))
        record = Record(spec, path, jobs, planned, elapsed)
        failed = _run(fixed, record, lock, console)
        results = record.write()
        if results is not None:
            plot_curves(results, spec.out / "curves.png")
            plot_arms(results, spec.out / "arms.png")
    if failed:
        lines = "; ".join(f"{outcome.run.name}: {outcome.line} (see {outcome.run.folder / LOG})" for outcome in failed)
        raise UserError(
            f"{len(failed)} of {len(planned)} runs failed; the same command repeats them, and {spec.out / TABLE} has the "
            f"others: {lines}"
        )
    return spec.out / TABLE


@contextmanager
def _timed(spec: StudySpec):
    """Yield a function that returns the study's total seconds, earlier commands included."""
    log = spec.out / SESSIONS
    earlier = sum(session["seconds"] for session in read_lines(log))
    began = time.monotonic()
    try:
        yield lambda: earlier + time.monotonic() - began
    finally:
        append_line(log, {"seconds": round(time.monotonic() - began, 2)})


def _with_fixed_config(spec: StudySpec) -> StudySpec:
    """Copy the config, so that editing the file does not change runs that start later."""
    copy = spec.out / "config.yaml"
    shutil.copyfile(spec.config, copy)
    return spec.model_copy(update={"config": copy})


def _starts(spec: StudySpec, console: Console) -> dict[int, Sequence[str]]:
    """Return the overrides for the start of each seed."""
    if spec.start is None:
        return {seed: [] for seed in spec.seeds}
    starts = {}
    for seed in spec.seeds:
        console.print(f"start of seed {seed}: digits, a tiny model, its warm start")
        folder = spec.out / "starts" / f"seed_{seed}"
        start = digits_start(folder, spec.config, seed, as_overrides(spec.set), spec.digits or DigitsSettings())
        starts[seed] = start.overrides
    return starts


def _run(spec: StudySpec, record: Record, lock: int, console: Console) -> list[Outcome]:
    """Run what is not finished; return the runs that failed."""
    todo = still_to_run(record.planned)
    record.write()  # fails before anything starts if existing results are not readable
    before = len(record.planned) - len(todo)
    budget = f"matched by {spec.match}, {spec.budget:,.10g} each"
    console.print(f"{len(record.planned)} runs, {before} of them finished before; {budget}; {spec.jobs} at a time")
    began, ended = time.monotonic(), []

    def tell(outcome: Outcome) -> None:
        ended.append(outcome)
        left = (len(todo) - len(ended)) * (time.monotonic() - began) / len(ended)
        told = _told(outcome, record.write())
        console.print(f"[{len(ended)}/{len(todo)}] {told}; about {left / 60:.0f} min left", markup=False)

    outcomes = Runner(spec.config, spec.jobs, spec.ranks, tell).run(todo, lock)
    return [outcome for outcome in outcomes if outcome.end == "failed"]


def _told(outcome: Outcome, results: StudyResults | None) -> str:
    run = outcome.run
    if outcome.end == "failed":
        return f"{run.name} failed: {outcome.line}"
    result = next(each for each in results.of_arm(run.arm) if each.seed == run.seed)
    spent = f"{result.spent['updates']:,.0f} updates, {result.spent['rollouts']:,.0f} rollouts, {result.wall_seconds:,.0f} s"
    if outcome.end == "diverged":
        return f"{run.name} diverged ({spent}): {outcome.line}"
    return f"{run.name} {result.start:.1%} -> {result.final:.1%}, best {result.best:.1%} ({spent})"
