"""`data.template`: a Jinja file that makes the user's text of a prompt. It cannot reach files, modules or attributes."""

import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mssr.data.conversation import Unusable
from mssr.errors import UserError, shortened


class PromptTemplate:
    """Called with a problem's text and the row's other columns, returns the user's text.

    In the file, `problem` and `content` are the text, a column has its own name, and `columns` has them all.
    """

    def __init__(self, path: str) -> None:
        """Raises:
        UserError: the file cannot be read, or is not valid Jinja; names the line.
        """
        self._path = path
        environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
        try:
            self._template = environment.from_string(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"data.template {path}: not a readable text file: {reason}") from None
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"data.template {path}, line {error.lineno}: not valid Jinja: {shortened(error.message, 300)}"
            ) from None

    def __call__(self, problem: str, columns: Mapping[str, Any]) -> str:
        """Raises:
        Unusable: it fails for this row, for instance because a column is missing; names the line.
        """
        try:
            text = self._template.render(
                {"columns": columns} | dict(columns) | {"problem": problem, "content": problem}
            )
        except Exception as error:  # a template may raise whatever Python raises
            frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
            line = f", line {frames[-1].lineno}" if frames else ""
            raise Unusable(f"data.template {self._path}{line}: {shortened(error, 300)}; fix it, or the row") from None
        if not text.strip():
            raise Unusable(f"data.template {self._path}: makes no text of this row; fix it, or remove the row")
        return text
