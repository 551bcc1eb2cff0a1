"""The problems of one source, whose rows are all checked before the run starts."""

import hashlib
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterable

from mssr.batch import Prompt
from mssr.config.data_keys import DataConfig
from mssr.data.cache import PromptCache
from mssr.data.check import Contents, check_rows
from mssr.data.columns import unread
from mssr.data.files import open_rows
from mssr.data.pixels import pixel_table
from mssr.data.prefetch import PromptLoader
from mssr.data.prompts import PromptEncoder, why_unusable
from mssr.distributed import ALONE, World
from mssr.errors import BadRow, UserError, shortened

SHOWN = 5  # bad rows named in an error


class ProblemDataset:
    """`dataset[i]` is the Prompt of usable row i; `prompt.row` is its index in the source, skipped rows counted.

    keys: [len] content hash of each problem, in the order of the rows; the value tracker's keys.
    bad_rows: rows left out under `data.on_bad_row: skip`.
    fingerprint: sha256 over keys and answers in order; the same for the same problems, wherever they are stored.
    solutions_fingerprint: the same over the solutions.
    """

    def __init__(
        self,
        path: str,
        encoder: PromptEncoder,
        config: DataConfig,
        world: World = ALONE,
        advance: Callable[[int, int], None] = lambda by, total: None,
    ) -> None:
        """world: the ranks that open this source together and share the checking.

        advance: told how far the checking is, see `check_rows`.
        """
        self.source = path
        self.keys: list[str] = []
        self.bad_rows: list[BadRow] = []
        self._encoder = encoder
        self._rows = open_rows(path, world)
        self._usable: list[int] = []
        if not len(self._rows):
            raise UserError(f"{self.source}: has no rows")
        checked = check_rows(self._rows, encoder, self.source, world, advance)
        self.fingerprint, self.solutions_fingerprint = self._sort_out(checked)
        if self.bad_rows and config.on_bad_row == "fail":
            raise UserError(self._describe_bad_rows("cannot be used") + "; fix them or set data.on_bad_row: skip")
        if not self._usable:
            raise UserError(self._describe_bad_rows("cannot be used") + "; no usable row is left")
        if world.is_main:
            if others := unread(self._rows.names):
                _say(f"{self.source}: columns that are not read: {shortened(', '.join(others), 300)}")
            if self.bad_rows:
                _say(self._describe_bad_rows("are skipped"))
        cache = PromptCache(int(config.cache_gib * 2**30), pixel_table(encoder.image_processor))
        self._loader = PromptLoader(self._encode, cache)

    def __len__(self) -> int:
        return len(self._usable)

    def __getitem__(self, index: int) -> Prompt:
        return self._loader.get(self._usable[index])

    def load(self, indices: Iterable[int]) -> list[Prompt]:
        """Return `[dataset[i] for i in indices]`, prepared in parallel.

        Raises:
            BadRow: a row was usable when the run started and no longer is, or its images are others now.
        """
        return self._loader.load([self._usable[index] for index in indices])

    def begin(self, indices: Iterable[int]) -> None:
        """Start to prepare what the next `load` will ask for, and return at once. That `load` raises the errors."""
        self._loader.begin([self._usable[index] for index in indices])

    def close(self) -> None:
        """Stop the threads that prepare prompts."""
        self._loader.close()

    def _encode(self, row: int) -> Prompt:
        try:
            columns = self._rows[row]
        except Exception as error:
            raise BadRow(row, self.source, why_unusable(error)) from None
        prompt = self._encoder.encode(columns, row, self.source)
        if prompt.key != self.keys[bisect_left(self._usable, row)]:
            raise BadRow(row, self.source, "its images have changed since they were checked; restore the files")
        return prompt

    def _sort_out(self, checked: list[Contents | BadRow]) -> tuple[str, str]:
        """Fill `_usable`, `keys` and `bad_rows`, and return both fingerprints."""
        fingerprint, solutions = hashlib.sha256(), hashlib.sha256()
        seen: dict[str, tuple[int, str]] = {}  # key -> first row that has it, its answer
        for row, found in enumerate(checked):
            if isinstance(found, BadRow):
                self.bad_rows.append(found)
                continue
            key, answer, solution = found
            first, known = seen.setdefault(key, (row, answer))
            if answer != known:
                theirs, ours = shortened(repr(known)), shortened(repr(answer))
                reason = f"same problem as row {first} with a different answer ({ours}, there {theirs})"
                self.bad_rows.append(BadRow(row, self.source, f"{reason}; keep one of them"))
                continue
            self._usable.append(row)
            self.keys.append(key)
            fingerprint.update(f"{key} {len(answer)} {answer}\n".encode())
            solutions.update(solution)
        return fingerprint.hexdigest(), solutions.hexdigest()

    def _describe_bad_rows(self, what: str) -> str:
        shown = "; ".join(f"row {bad.row}: {bad.reason}" for bad in self.bad_rows[:SHOWN])
        more = len(self.bad_rows) - SHOWN
        rest = f"; and {more} more" if more > 0 else ""
        return f"{self.source}: {len(self.bad_rows)} of {len(self._rows)} rows {what}: {shown}{rest}"


def _say(line: str) -> None:
    print(f"mssr: {line}", file=sys.stderr, flush=True)
