"""Problems of one source, every row checked before the run starts."""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

from mssr.batch import Prompt
from mssr.config import DataConfig
from mssr.data.files import open_rows
from mssr.data.prompts import Problem, PromptEncoder
from mssr.errors import BadRow, UserError

CACHE_BYTES = 1 << 30  # encoded prompts kept in memory; a small set is preprocessed once
ROWS_IN_FLIGHT = 64  # rows whose decoded images are held at once while a set is checked
SHOWN = 5  # bad rows named in an error


class ProblemDataset:
    """`dataset[i]` is the Prompt of usable row i; `prompt.row` is its index in the source, skipped rows counted.

    source: the path or name in messages.
    bad_rows: rows left out under `data.on_bad_row: skip`.
    fingerprint: sha256 over keys and answers in order; equal for equal problems wherever they are stored.
    """

    def __init__(self, path: str, encoder: PromptEncoder, config: DataConfig, source_name: str | None = None) -> None:
        self.source = source_name or str(path)
        self.bad_rows: list[BadRow] = []
        self._encoder = encoder
        self._rows = open_rows(str(path))
        self._cache = PromptCache(CACHE_BYTES)
        self._usable: list[int] = []
        if not len(self._rows):
            raise UserError(f"{self.source}: has no rows")
        self.fingerprint = self._check_rows()
        if self.bad_rows and config.on_bad_row == "fail":
            raise UserError(self._describe_bad_rows() + "; mend them or set data.on_bad_row: skip")
        if not self._usable:
            raise UserError(self._describe_bad_rows() + "; no usable row is left")

    def __len__(self) -> int:
        return len(self._usable)

    def __getitem__(self, index: int) -> Prompt:
        row = self._usable[index]
        prompt = self._cache.get(row)
        if prompt is None:
            prompt = self._encoder.encode(self._rows[row], row, self.source)
            self._cache.put(row, prompt)
        return prompt

    def __iter__(self) -> Iterator[Prompt]:
        return (self[index] for index in range(len(self)))

    def _check_rows(self) -> str:
        """Fills `_usable` and `bad_rows`; returns the fingerprint."""
        fingerprint = hashlib.sha256()
        seen: dict[str, tuple[int, str]] = {}  # key -> first row that has it, its answer
        for row, problem in self._read_rows():
            try:
                if isinstance(problem, BadRow):
                    raise problem
                self._encoder.check(problem, self.source)
                answer = problem.answer.strip()
                first, known = seen.setdefault(problem.key, (row, answer))
                if answer != known:
                    reason = f"same problem as row {first} with a different answer ({answer!r}, there {known!r})"
                    raise BadRow(row, self.source, f"{reason}; keep one of them")
            except BadRow as bad:
                self.bad_rows.append(bad)
                continue
            self._usable.append(row)
            fingerprint.update(f"{problem.key} {len(answer)} {answer}\n".encode())
        return fingerprint.hexdigest()

    def _read_rows(self) -> Iterator[tuple[int, Problem | BadRow]]:
        """All rows in order, images decoded in threads (Pillow decodes outside the interpreter lock)."""
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for start in range(0, len(self._rows), ROWS_IN_FLIGHT):
                rows = range(start, min(start + ROWS_IN_FLIGHT, len(self._rows)))
                yield from zip(rows, pool.map(self._read_row, rows), strict=True)

    def _read_row(self, row: int) -> Problem | BadRow:
        try:
            return self._encoder.read(self._rows[row], row, self.source)
        except BadRow as bad:
            return bad

    def _describe_bad_rows(self) -> str:
        shown = "; ".join(f"row {bad.row}: {bad.reason}" for bad in self.bad_rows[:SHOWN])
        more = len(self.bad_rows) - SHOWN
        rest = f"; and {more} more" if more > 0 else ""
        return f"{self.source}: {len(self.bad_rows)} of {len(self._rows)} rows cannot be used: {shown}{rest}"


class PromptCache:
    """Least recently used prompts leave when their tensors and images exceed `capacity` bytes."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._prompts: OrderedDict[int, Prompt] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()

    def get(self, row: int) -> Prompt | None:
        with self._lock:
            if row in self._prompts:
                self._prompts.move_to_end(row)
            return self._prompts.get(row)

    def put(self, row: int, prompt: Prompt) -> None:
        size = _size(prompt)
        with self._lock:
            if row in self._prompts or size > self.capacity:
                return
            self._prompts[row] = prompt
            self._bytes += size
            while self._bytes > self.capacity:
                _, dropped = self._prompts.popitem(last=False)
                self._bytes -= _size(dropped)


def _size(prompt: Prompt) -> int:
    pixels = 0 if prompt.pixel_values is None else prompt.pixel_values.nbytes
    return prompt.token_ids.nbytes + pixels + sum(len(image) for image in prompt.images)
