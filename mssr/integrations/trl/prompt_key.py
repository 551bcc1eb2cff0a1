"""Keys by which the value tracker recognises prompts."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from PIL import Image

from mssr.errors import UserError

_CONTENT = ("prompt", "image", "images")  # the columns from which TRL builds the model's input


def prompt_key(row: Mapping[str, Any]) -> str:
    """Return the dataset's `id` of a prompt if it has one, else a hash of its text and pixels.

    A run can therefore resume with rows added, removed or reordered. Rows with the same `id` share one baseline.

    Raises:
        UserError: the prompt contains an object that cannot be hashed.
    """
    if row.get("id") is not None:
        return str(row["id"])
    content = {name: row[name] for name in _CONTENT if row.get(name) is not None}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=_digest).encode()).hexdigest()


def _digest(value: Any) -> list:
    if isinstance(value, Image.Image):
        return [value.mode, *value.size, hashlib.sha256(value.tobytes()).hexdigest()]
    if isinstance(value, bytes):
        return [hashlib.sha256(value).hexdigest()]
    raise UserError(
        f"a prompt contains a {type(value).__name__}, which cannot be hashed to recognise the prompt; add a column `id` to "
        "the dataset"
    )
