"""Replies of a judge in a file that several processes may share, so that a run that is repeated asks nothing twice."""

import sqlite3
from contextlib import closing
from pathlib import Path

from mssr.errors import UserError

WAIT_S = 60.0  # for other processes


class ReplyFile:
    """A table of replies by key, in SQLite. Each use opens the file: safe in threads, and for processes of one machine."""

    def __init__(self, path: Path) -> None:
        """Open or create the file.

        Raises:
            UserError: it is a file of another kind, or cannot be written.
        """
        self._path = path
        try:
            with closing(self._open()) as file, file:
                tables = {name for (name,) in file.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
                if tables - {"replies"}:
                    raise UserError(f"cache: {path} is another database; name a file of its own, which need not exist")
                file.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL)")
        except sqlite3.Error as error:
            raise UserError(f"cache: {path}: {error}; name a file that can be written, which need not exist") from None

    def get(self, key: str) -> str | None:
        with closing(self._open()) as file:
            found = file.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
        return found and found[0]

    def put(self, key: str, reply: str) -> None:
        with closing(self._open()) as file, file:
            file.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (key, reply))

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, timeout=WAIT_S)
