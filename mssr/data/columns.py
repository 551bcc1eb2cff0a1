"""The columns of a row, which are EasyR1's: other names for them, the other columns, and those that would be ignored."""

import math
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from numbers import Number
from typing import Any

from mssr.config.data_keys import COLUMNS
from mssr.data.conversation import hoisted
from mssr.errors import UserError, shortened

Row = dict[str, Any]

REQUIRED = ("problem", "answer")
# Other names that can only mean the same; used where a row has nothing under ours. `image`, `question`: MMK12; `prompt` and
# `completion`: TRL; `messages`: OpenAI; `conversations`: ShareGPT; `reward_model`: verl.
ALIASES = {
    "image": "images",
    "image_paths": "images",
    "image_path": "images",
    "question": "problem",
    "prompt": "problem",
    "messages": "problem",
    "conversations": "problem",
    "reward_model.ground_truth": "answer",
    "completion": "solution",
}
LONGEST_NOTE = 4096  # characters of a text about a picture; a longer one may be the picture in base64

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


def require_columns(
    names: Iterable[str], source: str, columns: Mapping[str, str], *, needs_answer: bool = True
) -> None:
    """Check the names of a file's columns.

    columns: what `data.columns` says for this source.

    Raises:
        UserError: a name in `data.columns` is not among them, or a required column is not, under whichever name.
    """
    names = list(names)
    for ours, theirs in columns.items():
        if not _is_in(theirs, names):
            near = get_close_matches(theirs, names, n=1, cutoff=0)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise UserError(
                f"data.columns.{ours}: {source} has no column `{theirs}` (found: {shortened(', '.join(names), 300)}){meant}"
            )
    required = REQUIRED if needs_answer else REQUIRED[:1]
    lacking = [ours for ours in required if not any(_is_in(name, names) for name in _names_of(ours, columns))]
    if lacking:
        wanted = "`problem` and `answer`" if needs_answer else "`problem`"
        raise UserError(
            f"{source}: no column `{lacking[0]}` (found: {shortened(', '.join(names), 300)}); "
            f"rows need {wanted}, and `images` where there are any; other names: data.columns.{lacking[0]}=NAME"
        )


def may_be_read(columns: Mapping[str, str]) -> set[str]:
    """Return the names of the columns that a prompt may be made of."""
    return {name.partition(".")[0] for name in (*COLUMNS, *ALIASES)} | {
        part for name in columns.values() for part in (name, name.partition(".")[0])
    }


def others(names: Iterable[str], columns: Mapping[str, str]) -> list[str]:
    """Return the columns that are no part of a problem. An alias is one in the rows where our name, or an earlier alias, is
    empty; a column with our name is not read where `data.columns` names another one.
    """
    names = list(names)
    read = set(columns.values())
    notes = []
    for ours in COLUMNS:
        first = columns.get(ours)
        for name in _names_of(ours, {}):
            if name not in names or name in read:
                continue
            if ours in columns:
                notes += [f"{name} (data.columns names {first})"] if name == ours else []
                continue
            notes += [f"{name} (where {first} is filled)"] if first else []
            first = first or name
            read.add(name)
    return [name for name in names if name not in read and name not in COLUMNS] + notes


def renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """Return the row under our names, beside the other columns under their own.

    columns: what `data.columns` says for this source.
    Of a column with the name of a picture, or of data of other kinds, only short values are kept, which are notes about
    pictures. Of other values only whether there is something, unless `ignored_media` ignores it.

    Raises:
        Unusable: pictures are in the messages and in `images`.
    """
    ours, read = {}, set()
    for name in COLUMNS:
        for theirs in _names_of(name, columns):
            value, there = _look_up(row, theirs)
            if there and (name not in ours or _is_blank(name, ours[name])):
                ours[name] = value
                read.add(theirs)
    if isinstance(ours.get("problem"), list):
        ours = hoisted(ours)
    for name, value in row.items():
        if name in read or name in COLUMNS:
            continue
        if not _is_media(name) or _is_note(value):
            ours[name] = value
        elif not empty(value) and (_matches(_OTHER_KIND, name) or "images" not in ours):
            ours[name] = True
    return ours


def ignored_media(row: Row) -> str | None:
    """Return a column of this row that holds a picture, or data of another kind, which no prompt would contain.

    Beside `images`, other columns with the name of a picture are taken for notes, such as `image_width`.
    """
    for name, value in row.items():
        pictures = "images" not in row and _matches(_PICTURE, name)
        if name not in COLUMNS and (pictures or _matches(_OTHER_KIND, name)) and not empty(value):
            return name
    return None


def _names_of(ours: str, columns: Mapping[str, str]) -> list[str]:
    """Return the names under which a column is looked for; what `data.columns` takes for one is not taken for another."""
    if ours in columns:
        return [columns[ours]]
    names = [ours, *(alias for alias, of in ALIASES.items() if of == ours)]
    return [name for name in names if name not in columns.values()]


def _is_in(name: str, names: list[str]) -> bool:
    return name in names or ("." in name and name.partition(".")[0] in names)


def _look_up(row: Row, name: str) -> tuple[Any, bool]:
    """Return the value of a column, or of a field of a column (`reward_model.ground_truth`), and whether it is there."""
    if name in row:
        return row[name], True
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            return None, False
        value = value[part]
    return value, True


def _is_blank(name: str, value: Any) -> bool:
    return empty(value) if name == "images" else missing(value)


def _is_note(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_note, value))
    if isinstance(value, dict):
        return all(map(_is_note, value.values()))
    return value is None or isinstance(value, Number) or (isinstance(value, str) and len(value) <= LONGEST_NOTE)


def _is_media(name: str) -> bool:
    return _matches(_PICTURE, name) or _matches(_OTHER_KIND, name)


def _matches(pattern: re.Pattern, name: str) -> bool:
    return pattern.fullmatch(re.sub("(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()) is not None  # imagePath: image_path
