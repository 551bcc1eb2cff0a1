"""What a reward function gets besides the response's text."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from PIL import Image


@dataclass(frozen=True)
class Row:
    """The row of the data that a response answers, and facts about the response.

    problem, answer: text as in the row; answer is empty where the row has none. `row["level"]` is another column.
    prompt: as the model got it, rendered by the chat template.
    tokens: number of tokens of the response, end token included. max_tokens: `rollout.max_response_tokens`.
    truncated: whether the response was cut at max_tokens.
    columns: all other columns of the row. image_files: the encoded images.
    """

    problem: str
    answer: str
    prompt: str = ""
    tokens: int = 0
    max_tokens: int = 0
    truncated: bool = False
    columns: Mapping[str, Any] | None = None
    image_files: tuple[bytes, ...] = ()

    def __getitem__(self, column: str) -> Any:
        return (self.columns or {})[column]

    @cached_property
    def images(self) -> list[Image.Image]:
        """The decoded images, in the order of the prompt."""
        return [Image.open(io.BytesIO(file)) for file in self.image_files]
