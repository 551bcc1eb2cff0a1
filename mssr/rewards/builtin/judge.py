"""A judge: a model at an OpenAI-compatible address (vLLM's server, OpenAI, ...) reads the response and writes a score."""

import asyncio
import base64
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from mssr.errors import UserError, shortened
from mssr.rewards.chat import Chat
from mssr.rewards.extract import final, right_answer
from mssr.rewards.option_checks import require_bool, require_number
from mssr.rewards.reply_file import ReplyFile
from mssr.rewards.row import Row

REMEMBERED = 65_536  # scores

TEMPLATE = """\
You grade the answer to a problem.

Problem:
{{ problem }}

Right answer:
{{ answer }}

Answer to grade:
{{ final }}

Does the answer to grade say the same as the right answer? End with "Score: 1" if it does, else with "Score: 0".
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the judge.

    url: address up to /v1. model: its name there.
    template: text or file of the message, in Jinja, with problem, answer, response, final (the response without thinking),
    prompt, columns, and every other column of the row by its name. Without one: is the answer the right one?
    images: send the row's images too.
    pattern: finds the score in the reply: the last match counts, and of it the first group, if there is one.
    scale: number that the score is divided by, or the scores of words: {yes: 1, no: 0}.
    request: more fields of the request, such as {max_tokens: 512}.
    concurrency: most requests at a time, per rank. retries: how often a request is made again.
    request_timeout_s: for one request. key: environment variable with the API key.
    cache: false, true (in memory), or a file that outlives the run and may be shared.
    """

    url: str
    model: str
    template: str | None = None
    images: bool = False
    pattern: str | None = None
    scale: float | Mapping[str, float] = 1.0
    request: Mapping[str, Any] | None = None
    concurrency: int = 16
    retries: int = 4
    request_timeout_s: float = 120.0
    key: str | None = None
    cache: bool | str = True

    def __post_init__(self) -> None:
        if not isinstance(self.url, str) or not re.match(r"https?://[^/]", self.url):
            raise UserError(f"url: must start with http:// or https://, got {self.url!r}")
        if not isinstance(self.model, str) or not self.model:
            raise UserError(f"model: must be the name of a model of the server, got {self.model!r}")
        require_bool("images", self.images)
        require_number("concurrency", self.concurrency, at_least=1, whole=True)
        require_number("retries", self.retries, at_least=0, whole=True)
        require_number("request_timeout_s", self.request_timeout_s, at_least=0.001)
        for word, value in self.scale.items() if isinstance(self.scale, Mapping) else ():
            if not isinstance(word, str):
                raise UserError(f"scale: {word!r} is not a word; put it in quotes")
            require_number("scale", value, at_least=0, at_most=1)
        if not isinstance(self.scale, Mapping):
            require_number("scale", self.scale, at_least=0.001)
        if self.request is not None and not isinstance(self.request, Mapping):
            raise UserError(
                f"request: must be fields and their values, such as {{max_tokens: 512}}, got {self.request!r}"
            )
        if self.key is not None and not os.environ.get(str(self.key)):
            raise UserError(f"key: the environment variable {self.key} is not set; set it to the API key")
        if not isinstance(self.cache, bool | str) or self.cache == "":
            raise UserError(f"cache: must be true, false or a file, got {self.cache!r}")


async def judge(response: str, row: Row, **options: Any) -> float:
    """Return the judge's score of the response, in [0, 1]. options: those of `Options`."""
    return await _judge(asyncio.get_running_loop(), json.dumps(options, sort_keys=True)).score(response, row)


def _check(**options: Any) -> None:
    known = {each.name: each for each in fields(Options)}
    for name in options.keys() - known.keys():
        raise UserError(f"{name}: the judge has no such option; it has {', '.join(known)}")
    for name, each in known.items():
        if each.default is MISSING and name not in options:
            raise UserError(f"{name}: is missing; the judge needs its url and model")
    _Judge(Options(**options))


judge.check = _check
judge.timeout_s = 600.0  # of a call that waits for others, is made again, ...; `timeout_s` beside `function` changes it


@cache
def _judge(loop: asyncio.AbstractEventLoop, options: str) -> "_Judge":
    return _Judge(Options(**json.loads(options)))


class _Judge:
    """Asks one model, for one event loop."""

    def __init__(self, options: Options) -> None:
        """Read the template and open the cache; nothing is asked yet.

        Raises:
            UserError: an option cannot be used.
        """
        self._options = options
        self._template = _template(options.template)
        self._pattern = _pattern(options)
        self._chat = Chat(
            options.url,
            key=(options.key, os.environ[options.key]) if options.key else None,
            timeout_s=options.request_timeout_s,
            retries=options.retries,
            concurrency=options.concurrency,
        )
        self._scores: dict[str, asyncio.Task[float]] = {}
        self._file = ReplyFile(Path(options.cache).expanduser()) if isinstance(options.cache, str) else None

    async def score(self, response: str, row: Row) -> float:
        """Return the score, asked for once for equal requests.

        Raises:
            UserError: there is none; says what to do.
        """
        request = {
            "model": self._options.model,
            "messages": [{"role": "user", "content": self._message(response, row)}],
            "temperature": 0,
            **(self._options.request or {}),
        }
        if not self._options.cache:
            return self._score_of(await self._chat.ask(request))
        key = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        task = self._scores.get(key)
        if task is None:
            task = self._scores[key] = asyncio.create_task(self._new(key, request))
            task.add_done_callback(lambda ended: self._forget(key, ended))
        return await asyncio.shield(task)  # others may wait for it when this call is cancelled

    async def _new(self, key: str, request: dict[str, Any]) -> float:
        reply = await asyncio.to_thread(self._file.get, key) if self._file else None
        if reply is not None:
            return self._score_of(reply)
        reply = await self._chat.ask(request)
        score = self._score_of(reply)
        if self._file:
            await asyncio.to_thread(self._file.put, key, reply)
        return score

    def _forget(self, key: str, task: "asyncio.Task[float]") -> None:
        """Drop what failed, and the oldest of too many."""
        if task.cancelled() or task.exception() is not None:
            self._scores.pop(key, None)
        elif len(self._scores) > REMEMBERED:
            del self._scores[next(iter(self._scores))]

    def _message(self, response: str, row: Row) -> str | list[dict[str, Any]]:
        if self._options.template is None:
            right_answer(row)
        columns = dict(row.columns or {})
        known = {"problem": row.problem, "answer": row.answer, "response": response, "final": final(response).strip(),
                 "prompt": row.prompt, "columns": columns}  # fmt: skip
        try:
            text = self._template.render(columns | known)
        except jinja2.TemplateError as error:
            raise UserError(f"template: {shortened(error)}; a row has {', '.join(columns | known)}") from None
        if not self._options.images or not row.image_files:
            return text
        pictures = [{"type": "image_url", "image_url": {"url": _data_uri(file)}} for file in row.image_files]
        return [*pictures, {"type": "text", "text": text}]

    def _score_of(self, reply: str) -> float:
        match, scale = max(self._pattern.finditer(reply), key=re.Match.start, default=None), self._options.scale
        if match is None:
            raise UserError(
                f"no score in the judge's reply {shortened(reply)!r}; change template or pattern, or raise max_tokens"
            )
        word = match[1] if match.re.groups else match[0]
        try:
            if isinstance(scale, Mapping):
                score = {key.casefold(): value for key, value in scale.items()}[word.casefold()]
            else:
                score = float(word) / scale
        except (LookupError, ValueError, TypeError, AttributeError):
            score = math.nan
        if not 0 <= score <= 1:
            raise UserError(
                f"the judge's score {shortened(word)!r} is not within scale ({scale}); change template, pattern or scale"
            )
        return float(score)


def _template(given: str | None) -> jinja2.Template:
    text = TEMPLATE if given is None else given
    if given is not None and not isinstance(given, str):
        raise UserError(f"template: must be text or a file, got {given!r}")
    if "{{" not in text and "{%" not in text:
        try:
            text = Path(text).expanduser().read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(
                f"template: {shortened(given)}: {error}; give a file, or text with {{{{ response }}}}"
            ) from None
    try:
        return jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True).from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"template: line {error.lineno}: {shortened(error)}") from None


def _pattern(options: Options) -> re.Pattern:
    pattern = options.pattern
    if pattern is None and isinstance(options.scale, Mapping):
        pattern = rf"(?i)\b({'|'.join(map(re.escape, options.scale))})\b"
    try:
        return re.compile(r"(?i)\bscore\W{1,9}(\d+(?:\.\d+)?)" if pattern is None else pattern)
    except (TypeError, re.error) as error:
        raise UserError(f"pattern: {pattern!r} is not a regular expression: {error}") from None


def _data_uri(file: bytes) -> str:
    kind = Image.MIME.get(Image.open(io.BytesIO(file)).format, "image/png")
    return f"data:{kind};base64,{base64.b64encode(file).decode()}"
