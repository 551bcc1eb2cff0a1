"""The claims of a study, as its file has them."""

import difflib
from collections.abc import Iterable
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from bench.study.recorded import ACCURACY, SERIES

At = Literal["final", "best", "auc", "collapsed", "updates_to", "rollouts_to", "tokens_to", "seconds_to"]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Claim(Part):
    """A hypothesis that is decided by a paired difference: `metric` is higher in one arm than in another, by more than `by`.

    With a negative `by` it is a claim of non-inferiority: "higher by more than -0.02" is "at most 2 points lower".
    """

    text: str = Field(min_length=1, description="one sentence, as the report prints it")
    metric: str = Field(ACCURACY, description="a recorded series")
    at: At = Field(
        "final", description="auc: mean over the run; collapsed: share of runs; *_to: cost until `threshold` is reached"
    )
    higher: str = Field(description="arm")
    lower: str = Field(description="arm")
    by: float = 0.0
    threshold: float | None = Field(None, description="validation accuracy, for *_to; one of the study's thresholds")

    @model_validator(mode="after")
    def _says_one_thing(self):
        if self.metric not in SERIES:
            raise ValueError(f"metric {self.metric} is not recorded; did you mean {nearest(self.metric, SERIES)}?")
        if self.at not in ("final", "auc") and self.metric != ACCURACY:
            raise ValueError(f"at {self.at} is about {ACCURACY}; leave metric out")
        if self.at.endswith("_to") != (self.threshold is not None):
            raise ValueError(f"at {self.at}: threshold goes with updates_to, rollouts_to, tokens_to, seconds_to alone")
        if self.at == "collapsed" and self.by:
            raise ValueError("at collapsed is decided by an exact test of two shares; leave `by` out")
        if self.higher == self.lower:
            raise ValueError(f"compares arm {self.higher} with itself")
        return self


def nearest(name: str, known: Iterable[str]) -> str:
    return difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]
