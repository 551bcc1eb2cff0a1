"""What the value tracker knows a prompt by."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from PIL import Image

from mssr.errors import UserError

_CONTENT = ("prompt", "image", "images")  # the columns that TRL makes the model's input of


def prompt_key(row: Mapping[str, Any]) -> str:
    """The dataset's `id` of a prompt where it has one, else a hash of its text and its pixels.

    So a run may be resumed with rows added, removed or reordered. Rows with the same `id` share one baseline.

    Raises:
        UserError: the prompt holds something that has no content to hash.
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
        f"a prompt holds a {type(value).__name__}, which the value tracker cannot tell from another; give the dataset a "
        "column `id`"
    )
