"""Chooses the rows of each step: shuffled epochs, cut into steps."""

import random
from collections.abc import Collection, Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from math import floor

Part = tuple[int, float]  # number of rows of a source, and its weight


class PromptSampler:
    """Chooses rows by (seed, step) alone, so that a resumed run needs no sampler state.

    Each epoch is a new permutation of all rows. Nothing is dropped: a step may contain parts of two epochs, or several
    epochs if there are fewer rows than prompts per step (a row then appears at most ceil(prompts_per_step / size) + 1 times).

    A source of weight w has w times its rows in an epoch: of 2 every row twice; of 0.5 half of them, and in the next epoch
    the other half; of 1.5 all, and half of them once more.
    """

    def __init__(self, size: int, prompts_per_step: int, seed: int, parts: Sequence[Part] = ()) -> None:
        """parts: of the rows, in order, `size` together; none: all rows have weight 1."""
        self.size = size
        self.prompts_per_step = prompts_per_step
        self.seed = seed
        # Of the decimal that was written: 0.1 of 10 rows is 1 row in every epoch.
        self._parts = [(rows, Fraction(str(weight))) for rows, weight in parts or [(size, 1)]]
        self._epoch = lru_cache(maxsize=2)(self._permutation)

    def rows(self, step: int) -> list[int]:
        """Return the `prompts_per_step` rows of step 0, 1, 2, ..."""
        start = step * self.prompts_per_step
        epoch, rows = self._epoch_of(start), []
        while (left := self.prompts_per_step - len(rows)) > 0:
            place = start + len(rows) - self._start(epoch)
            rows += self._epoch(epoch)[place : place + left]
            epoch += 1
        return rows

    def refill(self, step: int, taken: Collection[int], count: int, round: int) -> list[int]:
        """Return `count` random rows to replace some of the step's. They still appear in the epoch as usual.

        Depends on the seed and the arguments alone. Repeats no row and none of `taken` until the others run out.

        taken: every row that the step had so far, those of earlier rounds included.
        round: of replacements in this step, from 0; each draws other rows.
        """
        draw = random.Random(f"{self.seed}/{step}/refill {round}")
        taken = set(taken)
        candidates = [row for row in range(self.size) if row not in taken]
        rows: list[int] = []
        while len(rows) < count:
            rows += draw.sample(candidates, min(len(candidates), count - len(rows)))
            candidates = list(range(self.size))
        return rows

    def _start(self, epoch: int) -> int:
        """Return the number of draws before an epoch."""
        return sum(floor(epoch * weight * rows) for rows, weight in self._parts)

    def _epoch_of(self, place: int) -> int:
        epoch = floor(place / sum(weight * rows for rows, weight in self._parts))
        while self._start(epoch + 1) <= place:  # the exact length of an epoch varies by a row per source
            epoch += 1
        return epoch

    def _permutation(self, epoch: int) -> list[int]:
        rows = sorted(self._drawn(epoch))
        random.Random(f"{self.seed}/{epoch}").shuffle(rows)
        return rows

    def _drawn(self, epoch: int) -> Iterator[int]:
        """Yield the rows of an epoch in any order: of each part the next ones of an endless series of passes over it."""
        first = 0
        for rows, weight in self._parts:
            start, end = floor(epoch * weight * rows), floor((epoch + 1) * weight * rows)
            for number in range(start // rows, -(-end // rows)):
                order = list(range(first, first + rows))
                if weight.denominator > 1:
                    random.Random(f"{self.seed}/part {first}/{number}").shuffle(order)
                yield from order[max(0, start - number * rows) : end - number * rows]
            first += rows
