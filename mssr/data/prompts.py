"""Turns one dataset row into one prompt: text by the chat template, images by the model's own processor."""

import copy
import errno
import hashlib
import json
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
from mssr.data.columns import COLUMNS, Row, ignored_media, missing
from mssr.data.conversation import IMAGE_MARKER, Turn, Unusable, is_sharegpt, read_completion, read_conversation
from mssr.data.images import decode_image, image_bytes
from mssr.data.processors import load_image_processor, with_pixel_limits
from mssr.data.template import PromptTemplate
from mssr.errors import BadRow, UserError, shortened

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

    text: of the problem, as in the row; of a conversation the last user turn.
    turns: of the prompt, complete. conversation: whether the row came as messages, and own_system: with a system turn.
    images: the encoded files. pictures: the same, decoded.
    columns: the row's other columns.
    """

    key: str
    text: str
    answer: str
    solution: str | None
    turns: tuple[Turn, ...]
    conversation: bool
    own_system: bool
    images: tuple[bytes, ...]
    pictures: tuple[Image.Image, ...]
    columns: dict[str, Any]


class TooLong(Unusable):
    """The prompt is longer than data.max_prompt_tokens."""


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
    needs_answer: whether a row without an answer is refused.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: BaseImageProcessor | None,
        config: DataConfig,
        *,
        needs_answer: bool = True,
    ) -> None:
        """Raises:
        UserError: data.template, data.system_prompt or data.instruction cannot be used.
        """
        self.tokenizer = tokenizer
        self.image_processor = None if image_processor is None else with_pixel_limits(image_processor, config)
        self.config = config
        self.needs_answer = needs_answer
        self._template = None if config.template is None else PromptTemplate(config.template)
        self.image_token = getattr(tokenizer, "image_token", None) or IMAGE_TOKEN
        token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.image_token_id = None if token_id == tokenizer.unk_token_id else token_id  # None: a text-only vocabulary
        for key in ("system_prompt", "instruction"):
            text = getattr(config, key) or ""
            if IMAGE_MARKER in text:
                raise UserError(f"data.{key} contains {IMAGE_MARKER}, which marks the images of a row; remove it")
            try:
                self._check_text(text, f"data.{key}")
            except Unusable as why:
                raise UserError(str(why)) from None

    def without_answers(self) -> "PromptEncoder":
        """Return a copy that takes rows without an answer: `mssr sft` imitates solutions."""
        other = copy.copy(self)
        other.needs_answer = False
        return other

    def encode(self, row: Row, index: int, source: str) -> Prompt:
        """Return the prompt of row `index` of `source`.

        Raises:
            BadRow: the row cannot be used; says why and what to do.
        """
        try:
            problem = self._read(row)
            pixel_values, grid, tokens = self._preprocess(problem.pictures)
            token_ids, rendered = self._tokenize(problem.turns, tokens)
        except Exception as error:
            raise BadRow(index, source, why_unusable(error)) from None
        return Prompt(
            key=problem.key,
            row=index,
            problem=problem.text,
            answer=problem.answer,
            solution=problem.solution,
            token_ids=torch.tensor(token_ids),
            pixel_values=pixel_values,
            image_grid_thw=grid,
            images=problem.images,
            columns=problem.columns,
            rendered=rendered,
            source=source,
        )

    def check(self, row: Row) -> Problem:
        """Return the row, read. Refuses what `encode` would refuse, without preprocessing the images. Safe in threads.

        Raises:
            Unusable: the row cannot be used; says why and what to do.
        """
        problem = self._read(row)
        self._tokenize(problem.turns, [self._count_tokens(picture) for picture in problem.pictures])
        return problem

    def _read(self, row: Row) -> Problem:
        """Check the columns and decode the images."""
        if column := ignored_media(row):
            raise Unusable(
                f"`{column}` holds something that is not read; only pictures in `images` are: "
                "move pictures there, or remove the row or the column"
            )
        columns = {name: value for name, value in row.items() if name not in COLUMNS}
        given = row.get("problem")
        conversation = isinstance(given, list)
        if conversation:
            turns, solution = self._read_messages(given, columns)
        else:
            turns, solution = (Turn("user", self._text(given, "problem")),), None
        answer = self._answer(row.get("answer"))
        own = row.get("solution")
        if solution is None and not missing(own):
            solution = self._text(read_completion(own) if isinstance(own, list) else own, "solution")
        *before, (_, text) = turns
        made = text if self._template is None else self._check_text(self._template(text, columns), "data.template")
        turns = (*before, Turn("user", made))
        images = row.get("images")
        images = images if isinstance(images, list) else [] if missing(images) else [images]
        self._check_markers(turns, len(images))
        # One user turn with the same text after it is the same prompt, whichever way it came.
        alike = self.config.appended(conversation=conversation) == self.config.appended(conversation=False)
        identity = made if len(turns) == 1 and alike else json.dumps(turns)
        files, pictures = _load_images(images)
        return Problem(
            key=_content_key(files, identity),
            text=text,
            answer=answer,
            solution=solution,
            turns=self._complete(turns, len(images), conversation),
            conversation=conversation,
            own_system=turns[0].role == "system",
            images=files,
            pictures=pictures,
            columns=columns,
        )

    def _read_messages(self, messages: list[Any], columns: dict[str, Any]) -> tuple[tuple[Turn, ...], str | None]:
        """Return the turns of a conversation, and its last turn of the assistant as the solution."""
        if columns.get("tools"):
            raise Unusable("has `tools`, which no prompt would contain; remove the column, or the row")
        turns, solution = read_conversation(messages)
        system = columns.get("system")  # LLaMA-Factory's, beside `conversations`
        if is_sharegpt(messages) and not missing(system) and turns[0].role != "system":
            turns = (Turn("system", self._text(system, "system")), *turns)
        for number, (role, text) in enumerate(turns, start=1):
            self._check_text(text, f"message {number} ({role})")
        return turns, None if solution is None else self._check_text(solution, "message of the assistant")

    def _check_markers(self, turns: tuple[Turn, ...], images: int) -> None:
        text = "\n".join(turn.text for turn in turns)
        name = "data.template" if self._template else "`problem`"
        for marker in OTHER_MARKER.finditer(text):
            if marker[0] != IMAGE_MARKER:
                raise Unusable(f"{name} contains {marker[0]}, which nothing is put in for; only {IMAGE_MARKER} is read")
        markers = text.count(IMAGE_MARKER)
        if markers and markers != images:
            raise Unusable(
                f"image token mismatch: {markers} {IMAGE_MARKER} in {name} but {images} in `images`; "
                "make them equal, or drop the markers to put all images first"
            )
        if images and self.image_processor is None:
            raise Unusable(
                "has images, but model.path is a text-only model: it has no preprocessor_config.json; "
                "use a vision-language model"
            )

    def _complete(self, turns: tuple[Turn, ...], images: int, conversation: bool) -> tuple[Turn, ...]:
        """Return the turns with all markers, which come first where there are none, system turn and instruction."""
        if not any(IMAGE_MARKER in turn.text for turn in turns):
            first = next(place for place, turn in enumerate(turns) if turn.role == "user")
            marked = Turn("user", IMAGE_MARKER * images + turns[first].text)
            turns = (*turns[:first], marked, *turns[first + 1 :])
        if appended := self.config.appended(conversation=conversation):
            turns = (*turns[:-1], Turn("user", f"{turns[-1].text}\n{appended}"))
        if self.config.system_prompt is not None and turns[0].role != "system":
            turns = (Turn("system", self.config.system_prompt), *turns)
        return turns

    def _answer(self, value: Any) -> str:
        """Return the answer as text; a list or object, such as boxes or several fields, as JSON."""
        if missing(value) and not self.needs_answer:
            return ""
        if not isinstance(value, list | dict):
            return self._text(value, "answer")
        try:
            return self._check_text(json.dumps(value, ensure_ascii=False, allow_nan=False), "`answer`")
        except (TypeError, ValueError) as error:
            raise Unusable(
                f"`answer` cannot be written as JSON: {shortened(error)}; fix it or remove the row"
            ) from None

    def _text(self, value: Any, column: str) -> str:
        if missing(value):
            raise Unusable(f"`{column}` is missing or empty; fill it in or remove the row")
        if not isinstance(value, str | int | float | Decimal):
            raise Unusable(f"`{column}` is a {type(value).__name__}; it must be text or a number")
        if not isinstance(value, str) and math.isinf(value):
            raise Unusable(f"`{column}` is not a finite number; write \\infty as text, or remove the row")
        # A float is 0.00001, as a person writes it, not 1e-05.
        number = Decimal(repr(float(value))) if isinstance(value, float) else value
        text = format(number, "f") if isinstance(number, Decimal) else str(number)
        return self._check_text(text, f"`{column}`")

    def _check_text(self, text: str, where: str) -> str:
        if half := SURROGATE.search(text):
            raise Unusable(
                f"{where} contains half of a surrogate pair, \\u{ord(half[0]):04x}, at character {half.start()}, "
                "which is no text; remove it"
            )
        for token in self._special_tokens:
            if token in text:
                raise Unusable(f"{where} contains the special token {token}; remove it (images are marked <image>)")
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

    def _tokenize(self, turns: tuple[Turn, ...], image_tokens: list[int]) -> tuple[list[int], str]:
        """Return the prompt's tokens, and its text. image_tokens: the number of tokens of each image."""
        rendered = self.tokenizer.apply_chat_template(
            [{"role": turn.role, "content": self._content(turn.text)} for turn in turns],
            tokenize=False,
            add_generation_prompt=True,
        )
        without_spaces = "".join(rendered.split())  # which a template may trim or change
        for role, text in turns:
            if role == "assistant":  # of earlier turns a template may leave out the thoughts
                continue
            if not all("".join(part.split()) in without_spaces for part in text.split(IMAGE_MARKER)):
                what = "`problem`" if role == "user" else "the system turn"
                raise Unusable(
                    f"the chat template of model.path leaves out or changes {what}; restore or replace the template"
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
            raise TooLong(
                f"prompt too long: {len(expanded)} tokens ({sum(image_tokens)} of images) > data.max_prompt_tokens "
                f"{limit}; raise it, or lower data.max_pixels"
            )
        return expanded, rendered

    def _content(self, text: str) -> str | list[dict[str, str]]:
        """Return the content of a message: the text, with images at the markers."""
        if self.image_processor is None:
            return text  # templates of text-only models take nothing but a string
        content = []
        for number, part in enumerate(text.split(IMAGE_MARKER)):
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
