"""Reads rows from parquet or JSON lines files, directories of them, or the Hugging Face hub.

Whatever the source, a row is a dict of the EasyR1 columns `images`, `problem`, `answer`, `solution`.
"""

import json
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from mssr.errors import UserError

COLUMNS = ("images", "problem", "answer", "solution")
REQUIRED = ("problem", "answer")
ALIASES = {"image": "images", "question": "problem"}  # column names of the MMK12 dataset
SUFFIXES = (".parquet", ".jsonl", ".json")  # of a directory, files with the first of these that occurs are read
SPLITS = ("train", "val", "test")  # how a split's files, or folders, begin; "val" also finds validation.parquet
ROWS_AT_ONCE = 256  # of a parquet file; images of a large row group do not fit one Arrow array

Row = dict[str, Any]


class Table(Sequence[Row]):
    """Rows of an Arrow table or a `datasets.Dataset` in Arrow format, read one at a time; images stay encoded."""

    def __init__(self, table: Any) -> None:
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Row:
        rows = self.table.slice(index, 1) if isinstance(self.table, pyarrow.Table) else self.table[index : index + 1]
        return rows.to_pylist()[0]


class Rows(Sequence[Row]):
    """The rows of several files as one sequence, with our column names and absolute image paths."""

    def __init__(self, parts: list[tuple[Path | None, Sequence[Row]]]) -> None:
        self.parts = parts  # (folder that relative image paths start from, rows)
        self._ends = list(accumulate(len(rows) for _, rows in parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Row:
        part = bisect_right(self._ends, index)
        folder, rows = self.parts[part]
        row = _renamed(rows[index - (self._ends[part - 1] if part else 0)])
        images = row.get("images")
        if folder is not None and images is not None:
            row["images"] = [_absolute(image, folder) for image in (images if isinstance(images, list) else [images])]
        return row


def open_rows(path: str) -> Rows:
    """Return the rows of a file, a directory, or a hub name; `directory:split` or `name:split` selects a split.

    Raises:
        UserError: nothing is there, it is not readable, or a required column is missing.
    """
    place, split = Path(path).expanduser(), None
    if not place.exists() and ":" in path:
        name, _, split = path.rpartition(":")
        place = Path(name).expanduser()
    if place.is_dir():
        place = _snapshot(place)
        return Rows([(file.parent, _read_file(file)) for file in _files(place, split)])
    if place.is_file():
        return Rows([(place.parent, _read_file(place))])
    if path.endswith(SUFFIXES) or path.startswith(("/", ".", "~")) or str(place).count("/") > 1:
        raise UserError(f"{path}: no such file or directory; give a .parquet or .jsonl file, or a hub name")
    return Rows([(None, _read_hub(str(place), split or "train", path))])


def _snapshot(folder: Path) -> Path:
    """Return the version that is checked out, if this is a dataset's folder in the hub's cache; else the folder."""
    main = folder / "refs" / "main"
    return folder / "snapshots" / main.read_text().strip() if main.is_file() else folder


def _files(folder: Path, split: str | None) -> list[Path]:
    for suffix in SUFFIXES:
        files = sorted(file for file in folder.rglob(f"*{suffix}") if split is None or _is_of(file, folder, split))
        if not files:
            continue
        found = {name for name in SPLITS for file in files if _is_of(file, folder, name)}
        if len(found) > 1:  # training on the test split must not happen by accident
            splits = ", ".join(sorted(found))
            raise UserError(f"{folder}: holds several splits ({splits}); name one, for example {folder}:train")
        return files
    wanted = f"file whose name starts with {split!r}" if split else "file"
    raise UserError(f"{folder}: no .parquet, .jsonl or .json {wanted} in this directory")


def _is_of(file: Path, folder: Path, split: str) -> bool:
    """Whether the file belongs to the split, by its own name or that of the innermost folder that names a split."""
    for part in reversed(file.relative_to(folder).parts):
        if part.startswith(split):
            return True
        if part.startswith(SPLITS):
            return False
    return False


def _read_file(file: Path) -> Sequence[Row]:
    if file.suffix == ".parquet":
        try:
            names = pyarrow.parquet.read_schema(file).names
            _require_columns(names, str(file))
            return Table(_read_parquet(file, _wanted(names)))
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{file}: not a readable parquet file: {_first_line(error)}") from None
    rows = _read_json(file)
    _require_columns(sorted({name for row in rows for name in row}) if rows else REQUIRED, str(file))
    return rows


def _read_parquet(file: Path, columns: list[str]) -> pyarrow.Table:
    with pyarrow.parquet.ParquetFile(file) as opened:
        schema = pyarrow.schema([opened.schema_arrow.field(name) for name in columns])
        batches = opened.iter_batches(ROWS_AT_ONCE, columns=columns)
        return pyarrow.Table.from_batches((batch.select(columns) for batch in batches), schema)


def _read_json(file: Path) -> list[Row]:
    """Read a JSON array of rows, or one row per line."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not readable as UTF-8 text: {_first_line(error)}") from None
    whole = text.lstrip().startswith("[")
    rows = []
    for number, line in enumerate([text] if whole else text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            parsed = json.loads(line)
        except json.JSONDecodeError as error:
            place = f"line {error.lineno if whole else number}, column {error.colno}"
            raise UserError(f"{file}, {place}: not valid JSON: {error.msg}") from None
        rows += parsed if whole else [parsed]
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{file}, row {number}: a {type(row).__name__}; each row must be an object of columns")
    return rows


def _read_hub(name: str, split: str, path: str) -> Sequence[Row]:
    import datasets  # slow to import, and only the hub needs it

    try:
        dataset = datasets.load_dataset(name, split=split)
    except Exception as error:  # network, authentication, unknown name or split: the library has a type for each
        raise UserError(f"{path}: neither a local file nor a hub dataset: {_first_line(error)}") from None
    _require_columns(dataset.column_names, path)
    return Table(dataset.select_columns(_wanted(dataset.column_names)).with_format("arrow"))


def _require_columns(names: Sequence[str], source: str) -> None:
    known = {ALIASES.get(name, name) for name in names}
    missing = [column for column in REQUIRED if column not in known]
    if missing:
        raise UserError(
            f"{source}: no column `{missing[0]}` (found: {', '.join(names)}); "
            "rows need `problem` and `answer`, and `images` where there are any"
        )


def _wanted(names: Sequence[str]) -> list[str]:
    return [name for name in names if name in COLUMNS or (name in ALIASES and ALIASES[name] not in names)]


def _renamed(row: Row) -> Row:
    renamed = {ALIASES[name]: value for name, value in row.items() if name in ALIASES}
    return renamed | {name: value for name, value in row.items() if name in COLUMNS}


def _absolute(image: Any, folder: Path) -> Any:
    if isinstance(image, str):
        return str(folder / image)
    if isinstance(image, dict) and isinstance(image.get("path"), str) and image.get("bytes") is None:
        return image | {"path": str(folder / image["path"])}
    return image


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
