"""Turns one dataset row into one prompt: text by the chat template, images by the model's own processor."""

import errno
import hashlib
import math
import re
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, BaseImageProcessor, PreTrainedTokenizerBase

from mssr.batch import Prompt
from mssr.config.data_keys import DataConfig
from mssr.data.columns import ignored_media, missing
from mssr.data.images import decode_image, image_bytes
from mssr.data.processors import load_image_processor, with_pixel_limits
from mssr.errors import BadRow, UserError, shortened

IMAGE_MARKER = "<image>"  # where the problem's text puts an image (EasyR1 rows)
# What marks an image, video or sound in other data sets, and would be read as text here: <video>, <image_1>, <|image|>
OTHER_MARKER = re.compile(r"<\|?(image|img|video|audio|speech)([ _-]?(\d+|placeholder|token|here))?\|?>", re.IGNORECASE)
STORAGE_FAILURES = {errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ETIMEDOUT, errno.ENOTCONN}
SURROGATE = re.compile("[\ud800-\udfff]")
IMAGE_TOKEN = "<|image_pad|>"  # in Qwen tokenizers without an `image_token`


def load_processors(path: str | Path) -> tuple[PreTrainedTokenizerBase, BaseImageProcessor | None]:
    """Return tokenizer and image processor of a model directory or hub name; no image processor for a text-only model.

    Raises:
        UserError: no tokenizer or image processor can be loaded, or the tokenizer has no chat template.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:
        raise UserError(f"model.path {path}: no tokenizer can be loaded from it: {shortened(error, 300)}") from None
    image_processor = load_image_processor(path)
    try:  # else it would be said of every row
        content = "?" if image_processor is None else [{"type": "text", "text": "?"}]
        tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    except Exception as error:
        reason = shortened(error, 300) if tokenizer.chat_template else "its tokenizer has none"
        raise UserError(
            f"model.path {path}: no usable chat template: {reason}; "
            "give a model that was trained to chat, or add chat_template.jinja"
        ) from None
    return tokenizer, image_processor


@dataclass(frozen=True, eq=False)
class Problem:
    """A row that has been read and checked, with images not yet preprocessed.

    images: the encoded files. pictures: the same, decoded.
    """

    key: str
    text: str
    answer: str
    solution: str | None
    images: tuple[bytes, ...]
    pictures: tuple[Image.Image, ...]


class Unusable(Exception):
    """Says why a row cannot be used; becomes a BadRow where the row's index is known."""


def why_unusable(error: Exception) -> str:
    """Return in one line why a row cannot be used; errors that nobody foresaw are bad rows as well.

    Raises:
        MemoryError, UserError: it is not the row: memory is exhausted, or storage failed.
    """
    if isinstance(error, MemoryError | UserError):
        raise error
    if isinstance(error, Unusable):
        return str(error)
    return f"cannot be prepared: {type(error).__name__}: {shortened(error, 300)}; fix or remove the row"


class PromptEncoder:
    """Turns rows into prompts. `check` is the cheap part, which a dataset runs on every row at the start.

    image_processor: the model's own, with the run's pixel limits.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, image_processor: BaseImageProcessor | None, config: DataConfig
    ) -> None:
        self.tokenizer = tokenizer
        self.image_processor = None if image_processor is None else with_pixel_limits(image_processor, config)
        self.config = config
        self.image_token = getattr(tokenizer, "image_token", None) or IMAGE_TOKEN
        token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.image_token_id = None if token_id == tokenizer.unk_token_id else token_id  # None: a text-only vocabulary

    def encode(self, row: dict[str, Any], index: int, source: str) -> Prompt:
        """Return the prompt of row `index` of `source`.

        Raises:
            BadRow: the row cannot be used; says why and what to do.
        """
        try:
            problem = self._read(row)
            pixel_values, grid, tokens = self._preprocess(problem.pictures)
            token_ids = torch.tensor(self._tokenize(problem.text, tokens))
        except Exception as error:
            raise BadRow(index, source, why_unusable(error)) from None
        return Prompt(
            key=problem.key,
            row=index,
            problem=problem.text,
            answer=problem.answer,
            solution=problem.solution,
            token_ids=token_ids,
            pixel_values=pixel_values,
            image_grid_thw=grid,
            images=problem.images,
        )

    def check(self, row: dict[str, Any]) -> Problem:
        """Return the row, read. Refuses what `encode` would refuse, without preprocessing the images. Safe in threads.

        Raises:
            Unusable: the row cannot be used; says why and what to do.
        """
        problem = self._read(row)
        self._tokenize(problem.text, [self._count_tokens(picture) for picture in problem.pictures])
        return problem

    def _read(self, row: dict[str, Any]) -> Problem:
        """Check the columns and decode the images."""
        if column := ignored_media(row):
            raise Unusable(
                f"`{column}` holds something that is not read; only pictures in `images` are: "
                "move pictures there, or remove the row or the column"
            )
        text = self._text(row, "problem")
        answer = self._text(row, "answer")
        solution = None if missing(row.get("solution")) else self._text(row, "solution")
        given = row.get("images")
        given = given if isinstance(given, list) else [] if missing(given) else [given]
        for marker in OTHER_MARKER.finditer(text):
            if marker[0] != IMAGE_MARKER:
                raise Unusable(
                    f"`problem` contains {marker[0]}, which nothing is put in for; only {IMAGE_MARKER} is read"
                )
        markers = text.count(IMAGE_MARKER)
        if markers and markers != len(given):
            raise Unusable(
                f"image token mismatch: {markers} {IMAGE_MARKER} in `problem` but {len(given)} in `images`; "
                "make them equal, or drop the markers to put all images first"
            )
        if given and self.image_processor is None:
            raise Unusable(
                "has images, but model.path is a text-only model: it has no preprocessor_config.json; "
                "use a vision-language model"
            )
        images, pictures = _load_images(given)
        return Problem(_content_key(images, text), text, answer, solution, images, pictures)

    def _text(self, row: dict[str, Any], column: str) -> str:
        value = row.get(column)
        if missing(value):
            raise Unusable(f"`{column}` is missing or empty; fill it in or remove the row")
        if not isinstance(value, str | int | float | Decimal):
            raise Unusable(f"`{column}` is a {type(value).__name__}; it must be text or a number")
        if not isinstance(value, str) and math.isinf(value):
            raise Unusable(f"`{column}` is not a finite number; write \\infty as text, or remove the row")
        # A float is 0.00001, as a person writes it, not 1e-05.
        number = Decimal(repr(float(value))) if isinstance(value, float) else value
        text = format(number, "f") if isinstance(number, Decimal) else str(number)
        if half := SURROGATE.search(text):
            raise Unusable(
                f"`{column}` contains half of a surrogate pair, \\u{ord(half[0]):04x}, at character {half.start()}, "
                "which is no text; remove it"
            )
        for token in self._special_tokens:
            if token in text:
                raise Unusable(f"`{column}` contains the special token {token}; remove it (images are marked <image>)")
        return text

    @cached_property
    def _special_tokens(self) -> list[str]:
        added = self.tokenizer.added_tokens_decoder.values()
        return sorted({str(token) for token in added if token.special} | {self.image_token})

    def _count_tokens(self, picture: Image.Image) -> int:
        """Return the number of image tokens of a picture, from its size alone."""
        try:
            patches = self.image_processor.get_number_of_image_patches(picture.height, picture.width)
        except ValueError as error:  # an aspect ratio the model was not made for
            raise Unusable(f"an image of {picture.width} x {picture.height} pixels is unusable: {error}") from None
        return patches // self.image_processor.merge_size**2

    def _preprocess(self, pictures: tuple[Image.Image, ...]) -> tuple[Tensor | None, Tensor | None, list[int]]:
        """Return pixel_values [patches, values per patch], grid [images, 3], and each image's number of tokens."""
        if not pictures:
            return None, None, []
        for picture in pictures:
            self._count_tokens(picture)  # refuses impossible shapes
        features = self.image_processor(list(pictures), return_tensors="pt")
        grid = features["image_grid_thw"]
        return features["pixel_values"], grid, (grid.prod(1) // self.image_processor.merge_size**2).tolist()

    def _tokenize(self, text: str, image_tokens: list[int]) -> list[int]:
        """Return the prompt's tokens. image_tokens: the number of tokens of each image."""
        rendered = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": self._content(text, len(image_tokens))}],
            tokenize=False,
            add_generation_prompt=True,
        )
        without_spaces = "".join(rendered.split())  # which a template may trim or change
        if not all("".join(part.split()) in without_spaces for part in text.split(IMAGE_MARKER)):
            raise Unusable(
                "the chat template of model.path leaves out or changes `problem`; restore or replace the template"
            )
        ids = self.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        pads = ids.count(self.image_token_id)
        if pads != len(image_tokens):
            raise Unusable(
                f"image token mismatch: the chat template of model.path made {pads} {self.image_token} "
                f"for {len(image_tokens)} images; use the template of a vision-language model"
            )
        counts = iter(image_tokens)
        # Plain lists: on so few tokens torch's parallel repeat_interleave costs milliseconds when the cores are busy.
        expanded = [copy for token in ids for copy in [token] * (next(counts) if token == self.image_token_id else 1)]
        limit = self.config.max_prompt_tokens
        if len(expanded) > limit:
            raise Unusable(
                f"prompt too long: {len(expanded)} tokens ({sum(image_tokens)} of images) > data.max_prompt_tokens "
                f"{limit}; raise it, or lower data.max_pixels"
            )
        return expanded

    def _content(self, text: str, images: int) -> str | list[dict[str, str]]:
        """Return the user message: images at the markers (or first), the text, then the instruction."""
        if IMAGE_MARKER not in text:
            text = IMAGE_MARKER * images + text
        parts = text.split(IMAGE_MARKER)
        if self.config.instruction:
            parts[-1] += "\n" + self.config.instruction
        if self.image_processor is None:
            return parts[0]  # templates of text-only models take nothing but a string
        content = []
        for number, part in enumerate(parts):
            content += [{"type": "image"}] if number else []
            content += [{"type": "text", "text": part}] if part else []
        return content


def _load_images(given: list[Any]) -> tuple[tuple[bytes, ...], tuple[Image.Image, ...]]:
    images, pictures = [], []
    for number, image in enumerate(given, start=1):
        name = f"image {number} of {len(given)}"
        path = image.get("path") if isinstance(image, dict) else image
        if isinstance(path, str | Path) and str(path).strip():
            name += f" ({shortened(path)})"
        try:
            images.append(image_bytes(image))
            pictures.append(decode_image(images[-1]))
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno in STORAGE_FAILURES:  # skipping the row would change the data
                raise UserError(f"{name}: {error.strerror}; it is not the file: try again, with --resume") from None
            why = error.strerror if isinstance(error, OSError) and error.strerror else shortened(error, 300)
            raise Unusable(f"{name} is unreadable: {why}; replace the file or remove the row") from None
    return tuple(images), tuple(pictures)


def _content_key(images: tuple[bytes, ...], text: str) -> str:
    """Return sha256 over images and text, each after its length, so that no two problems hash the same bytes."""
    digest = hashlib.sha256()
    for part in (*images, text.encode()):
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()
