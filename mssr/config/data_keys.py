"""`data.*`: where the problems come from, and how a row becomes a prompt."""

import math
from difflib import get_close_matches
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from mssr.config.paths import expanded
from mssr.config.section import OptionalPlace, Section

DEFAULT_INSTRUCTION = "Think step by step inside <think></think> tags, then give the final answer in \\boxed{}."
COLUMNS = ("images", "problem", "answer", "solution")  # what is read of a row; everything else is for the reward


def _read_sources(value: Any) -> Any:
    """Check a path, a list of paths or a mapping from path to weight, and expand the home folder."""
    if isinstance(value, str | PurePath) or value is None:
        return expanded(value)
    if not isinstance(value, list | dict) or not all(isinstance(path, str | PurePath) for path in value):
        hint = "; write a number in quotes" if isinstance(value, int | float) else ""
        raise ValueError(f"expected a path, [path, ...] or {{path: weight, ...}}, got {value!r}{hint}")
    paths = [expanded(path) for path in value]
    if not paths:
        raise ValueError("names no file")
    for path in paths:
        if paths.count(path) > 1:
            raise ValueError(f"{path} is listed twice; to draw its rows more often write {{{path}: 2}}")
    if isinstance(value, list):
        return paths
    for path, weight in value.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise ValueError(f"the weight of {path} is {weight!r}; expected a number > 0, such as 1 or 0.5")
    return dict(zip(paths, map(float, value.values())))


Files = str | list[str] | dict[str, float]
Sources = Annotated[Files, BeforeValidator(_read_sources)]
OptionalSources = Annotated[Files | None, BeforeValidator(_read_sources)]


def weights_of(sources: Files) -> dict[str, float]:
    """Return the weight of each source, in order; 1 where none is given."""
    if isinstance(sources, dict):
        return sources
    return dict.fromkeys([sources] if isinstance(sources, str) else sources, 1.0)


def written(sources: Files) -> str:
    """Return the sources as text, for messages: `a.parquet, b.parquet x 0.5`."""
    return ", ".join(path if weight == 1 else f"{path} x {weight:g}" for path, weight in weights_of(sources).items())


class DataConfig(Section):
    train: Sources = Field(
        description="training problems: parquet or JSON lines file, directory, or hub name (name:split); several as "
        "`[path, ...]` or `{path: weight, ...}`, where 2 draws each row twice per epoch and 0.5 in every other epoch"
    )
    val: OptionalPlace = Field(None, description="validation problems, same format; null: no validation")
    columns: dict[str, str | dict[str, str]] = Field(
        {},
        description="names of the columns in the files, as `{problem: question, answer: ground_truth, images: image}` "
        "(also `solution`); a dot reads a field (`reward_model.ground_truth`); for one file: `{path: {problem: ...}}`",
    )
    system_prompt: str | None = Field(
        None, description="system turn of every prompt that has none of its own; null: what the chat template does"
    )
    template: OptionalPlace = Field(
        None, description="Jinja file that makes the user's text from `problem` (or `content`) and the other columns"
    )
    instruction: str | None = Field(
        None,
        description="text appended to the last user turn of every prompt; null: to plain problems without data.template "
        f'"{DEFAULT_INSTRUCTION}", and nothing to conversations',
    )
    max_prompt_tokens: int = Field(2048, gt=0, description="maximum prompt length, image tokens included")
    min_pixels: int | None = Field(
        None,
        gt=0,
        description="smaller images are scaled up to this many pixels; null: the limit of the model's processor",
    )
    max_pixels: int | None = Field(
        None,
        gt=0,
        description="larger images are scaled down to this many pixels; null: the limit of the model's processor",
    )
    on_bad_row: Literal["fail", "skip"] = Field(
        "fail", description="unusable rows: fail stops the run, skip counts and ignores them"
    )
    drop_overlong: bool = Field(
        False, description="leave out prompts longer than max_prompt_tokens, and only those, whatever on_bad_row says"
    )
    drop_solved: float | None = Field(
        None,
        gt=0,
        le=1,
        description="prompts whose value in the tracker has reached this are not drawn in later epochs; null: all are",
    )
    cache_gib: float = Field(1.0, ge=0, description="host memory per rank for preprocessed prompts")

    def columns_of(self, source: str) -> dict[str, str]:
        """Return the names that the columns have in a source, by our names."""
        found = self.columns.get(source)
        if isinstance(found, dict):
            return found
        return {ours: theirs for ours, theirs in self.columns.items() if isinstance(theirs, str)}

    def appended(self, *, conversation: bool) -> str:
        """Return the text that is appended to the last user turn of a plain problem, or of a conversation."""
        if self.instruction is not None:
            return self.instruction
        return "" if conversation or self.template is not None else DEFAULT_INSTRUCTION

    @field_validator("columns", mode="before")
    @classmethod
    def _known_columns(cls, columns: Any) -> Any:
        """Refuse what is neither one of our columns nor a mapping for one source."""
        if columns is None:
            return {}
        if not isinstance(columns, dict):
            return columns
        checked = {}
        for key, value in columns.items():
            if isinstance(value, dict):
                checked[expanded(key)] = {name: _column(name, theirs) for name, theirs in value.items()}
            else:
                checked[key] = _column(key, value)
        return checked

    @model_validator(mode="after")
    def _pixels_ordered(self):
        if None not in (self.min_pixels, self.max_pixels) and self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} is larger than max_pixels {self.max_pixels}")
        return self


def _column(ours: Any, theirs: Any) -> str:
    if ours not in COLUMNS:
        near = get_close_matches(str(ours), COLUMNS, n=1, cutoff=0)[0]
        raise ValueError(f"{ours} is not a column that is read ({', '.join(COLUMNS)}); did you mean {near}?")
    if not isinstance(theirs, str) or not theirs.strip():
        raise ValueError(f"{ours} is {theirs!r}; expected the name of a column in the file")
    return theirs
