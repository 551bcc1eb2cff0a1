"""A study's YAML file: arms, seeds, budget and claims.

    python -m bench.study run bench/study/configs/digits_quick.yaml

The file and the configuration of each arm are validated before anything runs.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from bench.study.claims import Claim, Part, nearest
from bench.study.recorded import Match
from examples.digits.start import DigitsSettings
from mssr.config.load import read_keys
from mssr.config.paths import expanded
from mssr.errors import UserError

GivenPath = Annotated[Path, BeforeValidator(expanded)]


class StudySpec(Part):
    out: GivenPath = Field(description="folder for everything that the study writes")
    question: str = Field(min_length=1, description="one sentence")
    config: GivenPath = Field(description="configuration file of a run, relative to the current directory")
    set: dict[str, Any] = Field({}, description="dotted keys of the configuration, for every arm")
    start: Literal["digits"] | None = Field(
        None,
        description="digits: data, tiny model and warm start of each seed are made first; null: the configuration's",
    )
    digits: DigitsSettings | None = Field(None, description="the task and the model of start: digits")
    seeds: list[int] = Field([0, 1, 2, 3, 4], min_length=1)
    match: Match = Field(description="the cost that is equal for all runs: train.budget.<match>")
    budget: float = Field(gt=0)
    arms: dict[str, dict[str, Any]] = Field(
        min_length=1,
        description="name -> dotted keys of the configuration; the others are compared with the first",
    )
    jobs: int = Field(1, gt=0, description="runs at a time")
    ranks: int = Field(1, gt=0, description="processes of one run")
    thresholds: list[float] = Field([], description="validation accuracies; the cost to reach them is reported")
    claims: list[Claim] = Field([])
    report_intro: str = Field("", description="introduction of the report, Markdown")

    @model_validator(mode="before")
    @classmethod
    def _arms_without_changes(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("arms"), dict):
            return values | {"arms": {name: {} if keys is None else keys for name, keys in values["arms"].items()}}
        return values

    @model_validator(mode="after")
    def _settings_go_together(self):
        for name in self.arms:
            if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name):
                raise ValueError(f"arm {name!r} will name a folder: use letters, digits and . _ + -")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: one of them occurs twice")
        if self.match != "seconds" and self.budget != int(self.budget):
            raise ValueError(f"budget {self.budget} {self.match}: expected a whole number")
        if self.digits is not None and self.start != "digits":
            raise ValueError("digits are the settings of a start: set start: digits")
        self._refuse_crowded_clocks(self.jobs)
        for claim in self.claims:
            for arm in (claim.higher, claim.lower):
                if arm not in self.arms:
                    raise ValueError(f"claim {claim.text!r}: no arm {arm}; did you mean {nearest(arm, self.arms)}?")
            if claim.threshold is not None and claim.threshold not in self.thresholds:
                raise ValueError(f"claim {claim.text!r}: add {claim.threshold} to thresholds")
        return self

    def _refuse_crowded_clocks(self, jobs: int) -> None:
        if self.match == "seconds" and jobs > 1:
            raise ValueError(f"match seconds with {jobs} jobs: parallel runs slow each other down; set jobs to 1")

    def with_jobs(self, jobs: int) -> "StudySpec":
        """Raises:
        UserError: runs that are matched by seconds cannot run in parallel.
        """
        try:
            self._refuse_crowded_clocks(jobs)
        except ValueError as error:
            raise UserError(str(error)) from None
        return self.model_copy(update={"jobs": jobs})


def load_study(path: Path) -> StudySpec:
    """Read a study's file. The keys of the arms are checked by `bench.study.grid.expand`.

    Raises:
        UserError: the file is missing or not YAML, or a key occurs twice, is unknown or has an invalid value.
    """
    try:
        return StudySpec.model_validate(read_keys(Path(path), "study"))
    except ValidationError as error:
        raise UserError(f"{path}: {_in_one_line(error)}") from None


def _in_one_line(error: ValidationError) -> str:
    errors = error.errors()
    # A misspelt key is also missing; the unknown key is the better message.
    first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        section = {"claims": Claim, "digits": DigitsSettings}.get(first["loc"][0], StudySpec)
        return f"unknown key {key}; did you mean {nearest(str(first['loc'][-1]), section.model_fields)}?"
    given = "" if first["type"] in ("missing", "value_error") else f", got {first['input']!r}"
    return f"{key + ': ' if key else ''}{first['msg'].removeprefix('Value error, ')}{given}"
