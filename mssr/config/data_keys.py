"""`data.*`: where the problems come from, and how a row becomes a prompt."""

from typing import Literal

from pydantic import Field, model_validator

from mssr.config.section import OptionalPlace, Place, Section

DEFAULT_INSTRUCTION = "Think step by step inside <think></think> tags, then give the final answer in \\boxed{}."


class DataConfig(Section):
    train: Place = Field(
        description="training problems: parquet or JSON lines file, directory, or hub name (name:split)"
    )
    val: OptionalPlace = Field(None, description="validation problems, same format; null: no validation")
    instruction: str = Field(DEFAULT_INSTRUCTION, description="text appended to the problem in every prompt")
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
    cache_gib: float = Field(1.0, ge=0, description="host memory per rank for preprocessed prompts")

    @model_validator(mode="after")
    def _pixels_ordered(self):
        if None not in (self.min_pixels, self.max_pixels) and self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} is larger than max_pixels {self.max_pixels}")
        return self
