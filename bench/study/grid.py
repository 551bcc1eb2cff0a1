"""Arms x seeds: plans the runs of a study, each with the overrides for `mssr train`. Nothing is started here."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.study.spec import StudySpec
from mssr.config import Config, load_config, yaml_1_2
from mssr.errors import UserError

OWN_KEYS = ("run_dir", "seed", "train.steps", "train.budget")
START_KEYS = ("model.path", "data.train", "data.val")
NO_END = 1_000_000  # steps of a run with a budget of seconds


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
    """Return all runs, seed by seed, so that an interrupted study has complete seeds.

    source: the study's file, for messages. starts: overrides for the start of each seed; None: checks the rest without them.

    Raises:
        UserError: an unknown key, a key that the study sets itself, or arms that cannot have the same budget.
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
    """Return `key=value` for the command line, in YAML that reads back as the same value."""
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
    """Return a number of steps that is enough to use up the budget."""
    if config.data.val is None:
        raise UserError("a study compares validation accuracies: set data.val")
    if spec.match == "updates":
        if spec.budget % config.updates_per_step:
            raise UserError(
                f"budget {spec.budget:.0f} updates, but a step has {config.updates_per_step}, so the run would exceed it; "
                "choose a multiple"
            )
        return int(spec.budget) // config.updates_per_step
    if config.train.optimizer.schedule != "constant":
        raise UserError(
            f"train.optimizer.schedule {config.train.optimizer.schedule} needs the number of updates, which is unknown with "
            f"a budget of {spec.match}; set it to constant"
        )
    if spec.match == "seconds":
        return NO_END
    return math.ceil(spec.budget / config.responses_per_step)  # a response has at least one token


def _refuse_own_keys(spec: StudySpec, source: Path, place: str, keys: dict[str, Any]) -> None:
    for key in keys:
        if _is_part_of(key, OWN_KEYS):
            raise UserError(
                f"{source}: {place}: {key} is set by the study, from out, seeds, match and budget; remove it"
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
    return yaml_1_2.dump(value, default_flow_style=True, width=math.inf).removesuffix("...\n").strip()


def _leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves = {}
    for key, value in values.items():
        leaves |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves
