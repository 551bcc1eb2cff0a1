"""`mssr data show`: rows as the model will get them. Loads tokenizer and image processor, no weights."""

import io
import json
from collections.abc import Iterator
from itertools import islice

from PIL import Image

from mssr.batch import Prompt
from mssr.config import Config
from mssr.config.data_keys import weights_of
from mssr.data.files import Reading, check_json_columns, stream_rows
from mssr.data.prompts import PromptEncoder, load_processors, why_unusable
from mssr.errors import BadRow, UserError, shortened

LONGEST = 120  # characters of the value of a column


def show(config: Config, rows: int, row: int | None = None) -> Iterator[str]:
    """Yield a text for each of the first rows of every source of the configuration.

    row: show this row instead of the first ones.
    A row that cannot be used has its error instead, which starts with "mssr: ".

    Raises:
        UserError: a source or the model's processors cannot be read, a column is missing, or no source has this row.
    """
    encoder = PromptEncoder(*load_processors(config.model.path), config.data, needs_answer=config.reward.needs_answer)
    places = {"data.train": config.data.train, "data.val": config.data.val, "sft.data": config.sft.data}
    first, count = (0, rows) if row is None else (row, 1)
    shown = 0
    for key, sources in places.items():
        for path in weights_of(sources or []):
            encode = encoder.without_answers() if key == "sft.data" else encoder
            reading = Reading(config.data.columns_of(path), encode.needs_answer)
            for number, columns in enumerate(islice(stream_rows(path, reading), first, first + count), start=first):
                shown += 1
                try:
                    if isinstance(columns, Exception):
                        raise BadRow(number, path, why_unusable(columns))
                    yield describe(encode.encode(columns, number, path), encoder, key)
                except BadRow as bad:
                    check_json_columns(path, reading)  # if it is a column's name, that says more than the row
                    yield f"mssr: {bad}"
    if not shown:
        raise UserError(f"--row {row}: no source has so many rows" if row is not None else "there are no rows")


def describe(prompt: Prompt, encoder: PromptEncoder, key: str) -> str:
    """Return a prompt as text: what the model reads, with each run of image tokens short, and what it does not."""
    counts, lines = _image_tokens(prompt, encoder), [f"{key}: {prompt.source}, row {prompt.row}"]
    of_images = f", {sum(counts)} of images" if counts else ""
    lines.append(f"tokens      {len(prompt.token_ids)}{of_images}")
    for number, (file, tokens) in enumerate(zip(prompt.images, counts)):
        with Image.open(io.BytesIO(file)) as picture:
            size = f"{picture.width} x {picture.height}"
        _, height, width = (prompt.image_grid_thw[number] * encoder.image_processor.patch_size).tolist()
        lines.append(
            f"image {number + 1:<5} {size} pixels in the file, {width} x {height} for the model: {tokens} tokens"
        )
    lines.append(f"answer      {shortened(prompt.answer, LONGEST) or '(none)'}")
    if prompt.solution is not None:
        lines.append(f"solution    {shortened(prompt.solution, LONGEST)}")
    for name, value in prompt.columns.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=repr)
        lines.append(f"{name:<11} {shortened(text, LONGEST)}")
    text, rendered = "", prompt.rendered.split(encoder.image_token)
    for part, tokens in zip(rendered, [*counts, None]):
        text += part + (f"{encoder.image_token} x {tokens}" if tokens is not None else "")
    return "\n".join([*lines, "prompt", *(f"  | {line}" for line in text.split("\n"))])


def _image_tokens(prompt: Prompt, encoder: PromptEncoder) -> list[int]:
    if prompt.image_grid_thw is None:
        return []
    return (prompt.image_grid_thw.prod(1) // encoder.image_processor.merge_size**2).tolist()
