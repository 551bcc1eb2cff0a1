"""Arms x seeds: the runs of a study, each with the command line that `mssr train` gets. Nothing is started here."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bench.study.spec import StudySpec
from mssr.config import Config, load_config
from mssr.errors import UserError

OWN_KEYS = ("run_dir", "seed", "train.steps", "train.budget")
START_KEYS = ("model.path", "data.train", "data.val")
NO_END = 1_000_000  # steps of a run that a clock ends


@dataclass(frozen=True)
class PlannedRun:
    """overrides: applied to the study's config file. config: the result.

    started: whether the run uses the study's warm start.
    """

    arm: str
    seed: int
    folder: Path
    overrides: list[str]
    config: Config
    started: bool

    @property
    def name(self) -> str:
        return f"{self.arm} seed {self.seed}"

    def settings(self, config: Config) -> dict[str, Any]:
        """Return the settings that define this run, by dotted key; paths are left out so that the folder can be moved."""
        leaves = _leaves(config.model_dump(mode="json"))
        return {key: value for key, value in leaves.items() if key not in ("run_dir", *START_KEYS * self.started)}


def expand(spec: StudySpec, source: Path, starts: Mapping[int, Sequence[str]] | None = None) -> list[PlannedRun]:
    """Every run, seed by seed, so that a study that is cut short has whole seeds.

    source: the study's file, for messages. starts: overrides that name a seed's start; None: not made yet, to check the rest.

    Raises:
        UserError: a key that no configuration has, or that is the study's own; arms that cannot be matched.
    """
    _refuse_own_keys(spec, source, "set", spec.set)
    runs = []
    for seed in spec.seeds:
        start = starts[seed] if starts else [f"{key}=start" for key in START_KEYS] if spec.start else []
        for arm, keys in spec.arms.items():
            _refuse_own_keys(spec, source, f"arm {arm}", keys)
            try:
                runs.append(_plan(spec, arm, seed, start))
            except UserError as error:
                raise UserError(f"{source}: arm {arm}: {error}") from None
    return runs


def as_overrides(values: dict[str, Any]) -> list[str]:
    """`key=value` as the command line takes it, in YAML that reads back as the same value."""
    return [f"{key}={_one_line(value)}" for key, value in values.items()]


def _plan(spec: StudySpec, arm: str, seed: int, start: Sequence[str]) -> PlannedRun:
    folder = spec.out / "runs" / arm / f"seed_{seed}"
    overrides = as_overrides(spec.set | spec.arms[arm]) + list(start)
    overrides += as_overrides({"seed": seed, "run_dir": str(folder)})
    steps = _steps(spec, load_config(spec.config, overrides))
    budget = spec.budget if spec.match == "seconds" else int(spec.budget)
    overrides += as_overrides({"train.steps": steps, f"train.budget.{spec.match}": budget})
    return PlannedRun(arm, seed, folder, overrides, load_config(spec.config, overrides), started=spec.start is not None)


def _steps(spec: StudySpec, config: Config) -> int:
    """Return a number of steps that is certain to use up the budget."""
    if config.data.val is None:
        raise UserError("a study compares validation accuracies: set data.val")
    if spec.match == "updates":
        if spec.budget % config.updates_per_step:
            raise UserError(
                f"budget {spec.budget:.0f} updates, and a step makes {config.updates_per_step}: the run would make more "
                "than the others; choose a multiple"
            )
        return int(spec.budget) // config.updates_per_step
    if config.train.optimizer.schedule != "constant":
        raise UserError(
            f"train.optimizer.schedule {config.train.optimizer.schedule} needs to know the last update, and a budget of "
            f"{spec.match} does not tell; set it to constant"
        )
    if spec.match == "seconds":
        return NO_END
    return math.ceil(spec.budget / config.responses_per_step)  # a response has one token at least


def _refuse_own_keys(spec: StudySpec, source: Path, place: str, keys: dict[str, Any]) -> None:
    for key in keys:
        if _is_part_of(key, OWN_KEYS):
            raise UserError(
                f"{source}: {place}: {key} is the study's own: it follows from out, seeds, match and budget"
            )
        if spec.start and _is_part_of(key, START_KEYS):
            raise UserError(f"{source}: {place}: {key} comes from start: {spec.start}; leave one of them out")
        if any(name.startswith(f"{key}.") for name in (*OWN_KEYS, *START_KEYS)):
            raise UserError(
                f"{source}: {place}: {key} is a whole section; set its keys one by one, as {key}.name: value"
            )


def _is_part_of(key: str, own: tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in own)


def _one_line(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("...\n").strip()


def _leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves = {}
    for key, value in values.items():
        leaves |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves
