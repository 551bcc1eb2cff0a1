"""The problems of one or several sources, whose rows are all checked before the run starts."""

import hashlib
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from itertools import accumulate

from mssr.batch import Prompt
from mssr.config.data_keys import DataConfig, Files, weights_of, written
from mssr.data.cache import PromptCache
from mssr.data.check import Contents, Refused, check_rows
from mssr.data.columns import others
from mssr.data.files import Reading, open_rows
from mssr.data.pixels import pixel_table
from mssr.data.prefetch import PromptLoader
from mssr.data.prompts import PromptEncoder, why_unusable
from mssr.data.sampler import Part
from mssr.distributed import ALONE, World
from mssr.errors import BadRow, UserError, shortened

SHOWN = 5  # bad rows named in an error


class ProblemDataset:
    """`dataset[i]` is the Prompt of usable row i, over all sources in order; `prompt.source` and `prompt.row` say which row
    of which source it is, skipped rows counted.

    keys: [len] content hash of each problem, in the order of the rows; the value tracker's keys. The same problem in two
    sources has one key.
    parts: number of usable rows and weight of each source.
    bad_rows: rows left out under `data.on_bad_row: skip`. overlong: under `data.drop_overlong`.
    fingerprint: sha256 over keys and answers in order, and weights other than 1; the same for the same problems, wherever
        they are stored.
    solutions_fingerprint: the same over the solutions.
    """

    def __init__(
        self,
        sources: Files,
        encoder: PromptEncoder,
        config: DataConfig,
        world: World = ALONE,
        advance: Callable[[int, int], None] = lambda by, total: None,
    ) -> None:
        """world: the ranks that open these sources together and share the checking.

        advance: told how far the checking is, see `check_rows`.
        """
        self.source = written(sources)
        self.keys: list[str] = []
        self.parts: list[Part] = []
        self.bad_rows: list[BadRow] = []
        self.overlong: list[BadRow] = []
        self._encoder, self._config = encoder, config
        self._paths = list(weights_of(sources))
        self._rows = [
            open_rows(path, world, Reading(config.columns_of(path), encoder.needs_answer)) for path in self._paths
        ]
        for path, rows in zip(self._paths, self._rows):
            if not len(rows):
                raise UserError(f"{path}: has no rows")
        self._starts = list(accumulate(map(len, self._rows), initial=0))  # first row of each source among those of all
        self._usable: list[int] = []
        checked: list[Contents | Refused] = []
        for path, rows in zip(self._paths, self._rows):
            checked += check_rows(rows, encoder, path, world, lambda by, _: advance(by, self._starts[-1]))
        self._sort_out(checked, list(weights_of(sources).values()))
        if self.bad_rows and config.on_bad_row == "fail":
            raise UserError(self._describe(self.bad_rows, "cannot be used") + "; fix them or set data.on_bad_row: skip")
        if not self._usable:
            raise UserError(self._describe(self.bad_rows + self.overlong, "cannot be used") + "; no usable row is left")
        if world.is_main:
            self._say_what_was_found(checked)
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

    def place(self, index: int) -> tuple[str, int]:
        """Return the source of usable row `index`, and its number there."""
        return self._place(self._usable[index])

    def sizes(self) -> dict[str, int]:
        """Return the number of rows of each source, unusable ones included."""
        return {path: len(rows) for path, rows in zip(self._paths, self._rows)}

    def _place(self, row: int) -> tuple[str, int]:
        """row: among the rows of all sources."""
        source = bisect_right(self._starts, row) - 1
        return self._paths[source], row - self._starts[source]

    def _encode(self, row: int) -> Prompt:
        source, number = self._place(row)
        try:
            columns = self._rows[self._paths.index(source)][number]
        except Exception as error:
            raise BadRow(number, source, why_unusable(error)) from None
        prompt = self._encoder.encode(columns, number, source)
        if prompt.key != self.keys[bisect_left(self._usable, row)]:
            raise BadRow(number, source, "its images have changed since they were checked; restore the files")
        return prompt

    def _sort_out(self, checked: list[Contents | Refused], weights: list[float]) -> None:
        """Fill `_usable`, `keys`, `parts`, `bad_rows`, `overlong` and both fingerprints."""
        fingerprint, solutions = hashlib.sha256(), hashlib.sha256()
        seen: dict[str, tuple[int, str]] = {}  # key -> first row that has it, its answer
        for row, found in enumerate(checked):
            source, number = self._place(row)
            if isinstance(found, Refused):
                dropped = found.too_long and self._config.drop_overlong
                (self.overlong if dropped else self.bad_rows).append(BadRow(number, source, found.reason))
                continue
            first, known = seen.setdefault(found.key, (row, found.answer))
            if found.answer != known:
                there, other = self._place(first)
                where = f"row {other}" if there == source else f"row {other} of {there}"
                theirs, ours = shortened(repr(known)), shortened(repr(found.answer))
                reason = f"same problem as {where} with a different answer ({ours}, there {theirs})"
                self.bad_rows.append(BadRow(number, source, f"{reason}; keep one of them"))
                continue
            self._usable.append(row)
            self.keys.append(found.key)
            fingerprint.update(f"{found.key} {len(found.answer)} {found.answer}\n".encode())
            solutions.update(found.solution)
        counts = [
            bisect_left(self._usable, end) - bisect_left(self._usable, start)
            for start, end in zip(self._starts, self._starts[1:])
        ]
        self.parts = [part for part in zip(counts, weights) if part[0]]
        if any(weight != 1 for _, weight in self.parts):
            fingerprint.update(f"{self.parts}".encode())
        self.fingerprint, self.solutions_fingerprint = fingerprint.hexdigest(), solutions.hexdigest()

    def _describe(self, bad: list[BadRow], what: str) -> str:
        alone = len(self._paths) == 1
        shown = "; ".join(f"{'' if alone else f'{each.source}, '}row {each.row}: {each.reason}" for each in bad[:SHOWN])
        rest = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        return f"{self.source}: {len(bad)} of {self._starts[-1]} rows {what}: {shown}{rest}"

    def _say_what_was_found(self, checked: list[Contents | Refused]) -> None:
        for path, rows in zip(self._paths, self._rows):
            if found := others(rows.names, self._config.columns_of(path)):
                _say(f"{path}: columns besides the problem, for the reward: {shortened(', '.join(found), 300)}")
        usable = [found for found in checked if isinstance(found, Contents)]
        conversations = sum(found.conversation for found in usable)
        own_system = sum(found.own_system for found in usable)
        if structured := sum(found.structured for found in usable):
            _say(f"{self.source}: {structured} of {len(usable)} answers are lists or objects; the reward gets JSON")
        if conversations and self._config.instruction is None:
            _say(
                f"{self.source}: {conversations} of {len(usable)} prompts are conversations, to which nothing is added; "
                "to append a text set data.instruction"
            )
        if own_system and self._config.system_prompt is not None:
            _say(
                f"{self.source}: {own_system} of {len(usable)} prompts have a system turn of their own and do not get "
                "data.system_prompt"
            )
        if self.bad_rows:
            _say(self._describe(self.bad_rows, "are skipped"))
        if self.overlong:
            _say(self._describe(self.overlong, "are too long and left out"))


def _say(line: str) -> None:
    print(f"mssr: {line}", file=sys.stderr, flush=True)
