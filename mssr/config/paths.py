"""Paths as people type them: `~` is the home folder, and an empty one is refused."""

import os
import re
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

from mssr.errors import UserError


def expanded(path: Any) -> Any:
    """Return the path or hub name with `~` expanded; what is not text is left to the validation.

    Raises:
        ValueError: it is empty, as if a shell variable is not set; has a line break in it; or names a user that does not
            exist.
    """
    if not isinstance(path, str | PurePath):
        return path
    text = str(path)
    if not text.strip():
        raise ValueError("is empty; is a shell variable not set?")
    if re.search(r"[\x00-\x1f\x7f]", text):
        raise ValueError(f"{text!r} has a line break or another control character in it; remove it")
    text = os.path.expanduser(text)
    if text.startswith("~"):
        raise ValueError(f"{text}: there is no such home folder; write ./{text} for a folder of that name")
    return text


def without_variables(folder: Path) -> Path:
    """Return a folder that will be made, if no part of it is a variable, which only a shell expands.

    Raises:
        ValueError: it is `$NAME/...`.
    """
    if found := re.search(r"\$\{?[A-Za-z_]\w*\}?", str(folder)):
        raise ValueError(f"{found[0]} is not expanded in a file; write it out, or set run_dir on the command line")
    return folder


def path_for(option: str) -> Callable[[str], Path]:
    """Return the function that reads the path given for a command's option.

    Raises:
        UserError: by the function, as `expanded`.
    """

    def read(text: str) -> Path:
        try:
            return Path(expanded(text))
        except ValueError as error:
            raise UserError(f"{option} {error}") from None

    return read
