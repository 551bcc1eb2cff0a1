"""Chooses the rows of each step: shuffled epochs, cut into steps."""

import random
from collections.abc import Collection
from functools import lru_cache


class PromptSampler:
    """Chooses rows by (seed, step) alone, so that a resumed run needs no sampler state.

    Each epoch is a new permutation of all rows. Nothing is dropped: a step may contain parts of two epochs, or several
    epochs if there are fewer rows than prompts per step (a row then appears at most ceil(prompts_per_step / size) + 1 times).
    """

    def __init__(self, size: int, prompts_per_step: int, seed: int) -> None:
        self.size = size
        self.prompts_per_step = prompts_per_step
        self.seed = seed
        self._epoch = lru_cache(maxsize=2)(self._permutation)

    def rows(self, step: int) -> list[int]:
        """Return the `prompts_per_step` rows of step 0, 1, 2, ..."""
        start = step * self.prompts_per_step
        places = (divmod(place, self.size) for place in range(start, start + self.prompts_per_step))
        return [self._epoch(epoch)[place] for epoch, place in places]

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

    def _permutation(self, epoch: int) -> list[int]:
        rows = list(range(self.size))
        random.Random(f"{self.seed}/{epoch}").shuffle(rows)
        return rows
