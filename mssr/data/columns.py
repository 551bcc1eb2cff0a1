"""The columns of a row, which are EasyR1's: other names for them, and columns that would be ignored."""

import math
import re
from collections.abc import Iterable
from typing import Any

from mssr.errors import UserError, shortened

Row = dict[str, Any]

COLUMNS = ("images", "problem", "answer", "solution")
REQUIRED = ("problem", "answer")
# Other names that can only mean the same; used where a row has nothing under ours. `image`, `question`: MMK12.
ALIASES = {"image": "images", "image_paths": "images", "image_path": "images", "question": "problem"}

# Words of a column's name that say that it holds pictures, or data of kinds that are not read.
_PICTURE = re.compile(
    r"(.*[^a-z])?((image|img)(s|paths?|files?|names?|urls?|ids?)?|pictures?|pics?|photos?|figures?|diagrams?|screenshots?"
    r"|frames?|pixel_values|jpe?g|png|webp|gif|pdfs?|multi_?modal_data)([^a-z].*)?"
)
_OTHER_KIND = re.compile(
    r"(.*[^a-z])?(videos?|audios?|speech|mp4|mp3|wav|flac)([^a-z]*(paths?|files?|file_?names?|urls?|bytes|data))?[^a-z]*"
)


def missing(value: Any) -> bool:
    """Whether a cell is empty: null, blank text, or NaN, which pandas writes for an empty cell of a numeric column."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and not value.strip())


def empty(value: Any) -> bool:
    """Whether a cell holds no picture, film or sound: missing, false, 0, or a list or object of such values."""
    if isinstance(value, list | tuple):
        return all(map(empty, value))
    if isinstance(value, dict):
        return all(map(empty, value.values()))
    return missing(value) or not value


def require_columns(names: Iterable[str], source: str) -> None:
    """Raise a UserError unless the required columns are among these, under whichever name."""
    known = {ALIASES.get(name, name) for name in names}
    lacking = [column for column in REQUIRED if column not in known]
    if lacking:
        raise UserError(
            f"{source}: no column `{lacking[0]}` (found: {shortened(', '.join(names), 300)}); "
            "rows need `problem` and `answer`, and `images` where there are any"
        )


def to_load(names: Iterable[str]) -> list[str]:
    """Return the columns to load: ours, and those whose content would have to be refused."""
    return [name for name in names if name in COLUMNS or name in ALIASES or _is_media(name)]


def unread(names: Iterable[str]) -> list[str]:
    """Return the columns that are not read. An alias is read in the rows where our name, or an earlier alias, is empty."""
    names, read, others = list(names), {}, []
    for name in (*COLUMNS, *ALIASES):
        first = read.setdefault(ALIASES.get(name, name), name) if name in names else name
        others += [f"{name} (where {first} is filled)"] if first != name else []
    return [name for name in names if name not in COLUMNS and name not in ALIASES] + others


def renamed(row: Row) -> Row:
    """Return the row under our names. Of a column that `ignored_media` names, only whether it holds something."""
    columns = {name: row[name] for name in COLUMNS if name in row}
    for name, ours in ALIASES.items():
        if name in row and empty(columns.get(ours)):
            columns[ours] = row[name]
    return columns | {
        name: True
        for name, value in row.items()
        if name not in COLUMNS and name not in ALIASES and _is_media(name) and not empty(value)
    }


def ignored_media(row: Row) -> str | None:
    """Return a column of this row that holds a picture, or data of another kind, which no prompt would contain.

    Beside `images`, other columns with the name of a picture are taken for notes, such as `image_width`.
    """
    for name, value in row.items():
        pictures = "images" not in row and _matches(_PICTURE, name)
        if name not in COLUMNS and (pictures or _matches(_OTHER_KIND, name)) and not empty(value):
            return name
    return None


def _is_media(name: str) -> bool:
    return _matches(_PICTURE, name) or _matches(_OTHER_KIND, name)


def _matches(pattern: re.Pattern, name: str) -> bool:
    return pattern.fullmatch(re.sub("(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()) is not None  # imagePath: image_path
