"""Rows in a temporary file instead of memory: the processes of a machine share one, which has no name.

Parquet cannot be read by row: a shuffled epoch would decode a row group, often the whole file, for every row.
"""

import os
import pickle
import tempfile
from array import array
from collections.abc import Iterable, Sequence
from typing import IO

from mssr.data.columns import Row
from mssr.distributed import World
from mssr.errors import UserError
from mssr.folder_lock import this_machine

TOKEN_BYTES = 16

Place = tuple[str, bytes]  # how other processes open the file, and the bytes that it ends with


class RowFile(Sequence[Row]):
    """Rows, read one at a time from an open file; safe in several threads.

    names: of all columns of the source, those included that no row has any more.

    The file: pickled rows; their offsets and the names, pickled; the size of these; a random token.
    """

    def __init__(self, file: IO[bytes], offsets: array, names: list[str], token: bytes) -> None:
        self.names = names
        self._file = file
        self._offsets = offsets
        self._token = token

    @classmethod
    def write(cls, rows: Iterable[Row | Exception], names: list[str], source: str) -> "RowFile":
        """Write rows to a new file in TMPDIR. An exception among them is raised by whoever asks for that row.

        names: need not be complete before all rows are read.

        Raises:
            UserError: the file cannot be written, or `rows` raises it.
        """
        offsets, token = array("q", [0]), os.urandom(TOKEN_BYTES)
        try:
            file = tempfile.TemporaryFile(prefix="mssr_rows_")  # noqa: SIM115  closed with the RowFile, and gone then
            for row in rows:
                offsets.append(offsets[-1] + file.write(pickle.dumps(row, pickle.HIGHEST_PROTOCOL)))
            index = pickle.dumps((offsets, names))
            file.write(index + len(index).to_bytes(8, "little") + token)
            file.flush()
        except OSError as error:
            place, wanted = tempfile.tempdir, os.environ.get("TMPDIR")
            where = f" in {place}" if place else ""
            not_there = f" (TMPDIR {wanted} cannot be used)" if wanted and os.path.abspath(wanted) != place else ""
            raise UserError(
                f"{source}: cannot copy its rows to a temporary file{where}{not_there}: {error.strerror}; "
                "set the environment variable TMPDIR to a folder with room for a copy of the data"
            ) from None
        return cls(file, offsets, names, token)

    @classmethod
    def share(cls, place: Place) -> "RowFile | None":
        """Open the file of another process; None if it is on another machine, or not visible from here.

        In another container, the process id may be that of another process, and the file anything: a pipe, a device.
        """
        name, token = place
        try:
            file = open(name, "rb", opener=_without_waiting)  # noqa: SIM115  stays open as long as the rows
            size = os.fstat(file.fileno()).st_size
            tail = os.pread(file.fileno(), TOKEN_BYTES + 8, max(0, size - TOKEN_BYTES - 8))
        except OSError:
            return None
        if tail[8:] != token:
            file.close()
            return None
        nbytes = int.from_bytes(tail[:8], "little")
        offsets, names = pickle.loads(os.pread(file.fileno(), nbytes, size - len(tail) - nbytes))
        return cls(file, offsets, names, token)

    @property
    def place(self) -> Place:
        return f"/proc/{os.getpid()}/fd/{self._file.fileno()}", self._token

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> Row:
        index = range(len(self))[index]
        start, end = self._offsets[index], self._offsets[index + 1]
        row = pickle.loads(os.pread(self._file.fileno(), end - start, start))
        if isinstance(row, Exception):
            raise row
        return row


def write_once(rows: Iterable[Row | Exception], names: list[str], source: str, world: World) -> RowFile:
    """Write rows to a file, as `RowFile.write`. Of the ranks of `world` on a machine, the first writes the file for all.

    Collective. A rank that cannot see the file of the first reads the rows itself and writes one of its own.
    """
    keys = world.gather((this_machine(), source))
    first = keys.index(keys[world.rank])
    file = None
    with world.together():
        if first == world.rank:
            file = RowFile.write(rows, names, source)
    places = world.gather(None if file is None else file.place)
    if file is None:
        file = RowFile.share(places[first])
    with world.together():  # the first keeps its file open until all have it
        if file is None:
            file = RowFile.write(rows, names, source)
    return file


def _without_waiting(name: str, flags: int) -> int:
    return os.open(name, flags | os.O_NONBLOCK)
