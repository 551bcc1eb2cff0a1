"""Reads rows from parquet or JSON lines files, directories of them, or the Hugging Face hub.

Whatever the source, a row is a dict of the EasyR1 columns `images`, `problem`, `answer`, `solution`, and of its other
columns under their own names.
"""

import codecs
import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from mssr.data.columns import Row, empty, may_be_read, renamed, require_columns
from mssr.data.conversation import Unusable
from mssr.data.images import is_path
from mssr.data.row_file import RowFile, write_once
from mssr.distributed import ALONE, World
from mssr.errors import UserError, shortened

SUFFIXES = (".parquet", ".jsonl", ".json")  # of a directory, files with the first of these that occurs are read
SPLITS = ("train", "val", "test")  # how a split's files, or folders, begin; "val" also finds validation.parquet
ROWS_AT_ONCE = 64  # of a parquet file; images of a large row group do not fit one Arrow array
READ_AHEAD = 2**20  # bytes of a parquet file


@dataclass(frozen=True)
class Reading:
    """How to read a source: the names of its columns (`data.columns`), and whether an answer is needed."""

    columns: Mapping[str, str] = field(default_factory=dict)
    needs_answer: bool = True

    def check(self, names: Iterable[str], source: str) -> None:
        require_columns(names, source, self.columns, needs_answer=self.needs_answer)


class HubRows(Sequence[Row]):
    """Rows of a `datasets.Dataset` in Arrow format, which maps its files into memory; images stay encoded."""

    def __init__(self, dataset: Any, reading: Reading) -> None:
        self.names = dataset.column_names
        self._dataset = dataset.with_format("arrow")
        self._columns = reading.columns

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Row:
        index = range(len(self))[index]
        (row,) = _to_rows(self._dataset[index : index + 1], may_be_read(self._columns))
        if isinstance(row, Exception):
            raise row
        return renamed(row, self._columns)


def open_rows(path: str, world: World = ALONE, reading: Reading | None = None) -> RowFile | HubRows:
    """Return the rows of a file, a directory, or a hub name; `directory:split` or `name:split` selects a split.

    world: the ranks that open the same path together; on each machine one of them reads the files.

    Raises:
        UserError: nothing is there, it is not readable, or a required column, or one of `data.columns`, is missing.
    """
    reading = reading or Reading()
    with world.together():
        found = _find(path)
    if not isinstance(found, tuple):
        names: list[str] = []
        return write_once(_read_files(found, names, reading), names, path, world)
    with world.together():
        return _read_hub(*found, path, reading)


def stream_rows(path: str, reading: Reading) -> Iterator[Row | Exception]:
    """Yield the rows of what `open_rows` opens without a copy; in place of a row that cannot be read, the error.

    Raises:
        UserError: as `open_rows`; of JSON lines, the columns are checked at their end.
    """
    found = _find(path)
    if not isinstance(found, tuple):
        yield from _read_files(found, [], reading)
        return
    rows = _read_hub(*found, path, reading)
    for index in range(len(rows)):
        try:
            yield rows[index]
        except Exception as error:
            yield error


def check_json_columns(path: str, reading: Reading) -> None:
    """Read JSON lines to their end, where `stream_rows` checks the columns; does nothing for other formats.

    Raises:
        UserError: as `open_rows`.
    """
    found = _find(path)
    for file in found if isinstance(found, list) else ():
        if file.suffix != ".parquet":
            deque(_read_json(file, [], reading), maxlen=0)


def _find(path: str) -> list[Path] | tuple[str, str]:
    """Return the files, or name and split of a dataset of the hub."""
    place, split = Path(path), None
    if not _exists(place) and ":" in path:
        name, _, split = path.rpartition(":")
        place = Path(name)
    if _exists(place):
        return _files(_snapshot(place), split) if place.is_dir() else [place]
    if path.endswith(SUFFIXES) or path.startswith(("/", ".")) or str(place).count("/") > 1:
        shown = shortened(path, 300)
        raise UserError(f"{shown}: no such file or directory; give a .parquet or .jsonl file, or a hub name")
    return str(place), split or "train"


def _exists(place: Path) -> bool:
    try:
        return place.exists()
    except OSError:  # the name is too long, or a folder on the way may not be entered
        return False


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


def _read_files(files: list[Path], names: list[str], reading: Reading) -> Iterator[Row | Exception]:
    """Yield the rows, with our column names and absolute image paths, and add the columns of all files to `names`.

    Images are read when rows are used.
    """
    for file in files:
        read = _read_parquet if file.suffix == ".parquet" else _read_json
        for row in read(file, names, reading):
            if not isinstance(row, Exception):
                try:
                    row = _with_folder(renamed(row, reading.columns), file.parent)
                except Unusable as why:
                    row = why
            yield row


def _read_parquet(file: Path, names: list[str], reading: Reading) -> Iterator[Row | Exception]:
    try:
        # With pyarrow's own settings, whole row groups are in memory. So are at least the 1,024 rows of a page, or two.
        with pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=READ_AHEAD) as opened:
            columns = opened.schema_arrow.names
            _add(names, columns)
            reading.check(columns, str(file))
            for column in columns:
                if columns.count(column) > 1:
                    raise UserError(f"{file}: column `{column}` is there twice; remove one")
            for batch in opened.iter_batches(ROWS_AT_ONCE, use_threads=False):
                yield from _to_rows(batch, may_be_read(reading.columns))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: not a readable parquet file: {_first_line(error)}") from None
    pyarrow.default_memory_pool().release_unused()


def _to_rows(batch: pyarrow.RecordBatch | pyarrow.Table, read: set[str]) -> list[Row | Exception]:
    """Return the rows of a batch; in place of a row that does not convert, such as text that is not UTF-8, its error.

    read: names of the columns that matter. Of the others, a value that does not convert is left out of its row.
    """
    try:
        return _short_floats(batch).to_pylist()
    except Exception as error:
        if batch.num_rows > 1:
            return [row for index in range(batch.num_rows) for row in _to_rows(batch.slice(index, 1), read)]
        if batch.num_columns > 1:
            parts = {name: _to_rows(batch.select([name]), read)[0] for name in batch.schema.names}
            bad = [part for name, part in parts.items() if name in read and isinstance(part, Exception)]
            if not bad:
                return [{name: part[name] for name, part in parts.items() if not isinstance(part, Exception)}]
            return bad[:1]
        return [ValueError(f"cannot be read: {_first_line(error)}")]


def _short_floats(rows: pyarrow.RecordBatch | pyarrow.Table) -> pyarrow.RecordBatch | pyarrow.Table:
    """Return the rows with a 0.1 of 32 bits as the 0.1 of 64 bits, not as 0.10000000149011612."""
    for place, column in enumerate(rows.columns):
        if column.type == pyarrow.float32():
            rows = rows.set_column(
                place, rows.schema.names[place], column.cast(pyarrow.string()).cast(pyarrow.float64())
            )
    return rows


def _read_json(file: Path, names: list[str], reading: Reading) -> Iterator[Row]:
    """Read a JSON array of rows, or one row per line."""
    found, number = [], -1
    for number, row in enumerate(_parse_json(file)):
        if not isinstance(row, dict):
            raise UserError(f"{file}, row {number}: a {type(row).__name__}; each row must be an object of columns")
        _add(found, row)
        yield row
    if number >= 0:
        reading.check(sorted(found), str(file))
    _add(names, found)


def _parse_json(file: Path) -> Iterator[Any]:
    try:
        with file.open("rb") as lines:
            begun = False
            for number, line in enumerate(lines, start=1):
                text = _decode(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line)
                if not text.strip():
                    continue
                if not begun and text.lstrip().startswith("["):
                    yield from _parse(file, number, text + _decode(lines.read()))
                else:
                    yield _parse(file, number, text)
                begun = True
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not readable as UTF-8 text: {_first_line(error)}") from None


def _decode(data: bytes) -> str:
    """Decode UTF-8. Half of a surrogate pair, which is not valid there, is left to whoever checks the rows."""
    return data.decode("utf-8", "surrogatepass")


def _parse(file: Path, line: int, text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        place = f"line {line - 1 + error.lineno}, column {error.colno}"
        raise UserError(f"{file}, {place}: not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a key twice, a number of thousands of digits, lists in lists
        raise UserError(f"{file}, line {line}: not usable JSON: {_first_line(error)}") from None


def _unique(pairs: list[tuple[str, Any]]) -> Row:
    """Return an object of JSON, whose parser would silently take the last value of a key that is there twice."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return row


def _add(names: list[str], others: Iterable[str]) -> None:
    names += [name for name in others if name not in names]


def _read_hub(name: str, split: str, path: str, reading: Reading) -> HubRows:
    import datasets  # slow to import, and only the hub needs it

    try:
        dataset = datasets.load_dataset(name, split=split)
    except Exception as error:  # network, authentication, unknown name or split: the library has a type for each
        raise UserError(f"{path}: neither a local file nor a hub dataset: {_first_line(error)}") from None
    reading.check(dataset.column_names, path)
    return HubRows(dataset, reading)


def _with_folder(row: Row, folder: Path) -> Row:
    """Return the row with a list of images, whose relative paths start at the folder."""
    images = row.get("images")
    if empty(images) and not isinstance(images, list | dict):
        return row
    return row | {"images": [_absolute(image, folder) for image in (images if isinstance(images, list) else [images])]}


def _absolute(image: Any, folder: Path) -> Any:
    if is_path(image):
        return str(folder / image)
    if isinstance(image, dict) and is_path(image.get("path")) and image.get("bytes") is None:
        return image | {"path": str(folder / image["path"])}
    return image


def _first_line(error: Exception) -> str:
    return shortened(str(error).strip().partition("\n")[0] or type(error).__name__, 300)
