"""Rows of each step: shuffled epochs, cut into steps."""

import random
from collections.abc import Collection
from functools import lru_cache


class PromptSampler:
    """`rows(step)` depends on (seed, step) and nothing else, so a resumed run needs no sampler state.

    Each epoch is a fresh permutation of all rows. Nothing is dropped: a step may straddle two epochs, or hold several
    when the set is smaller than a step (then a row appears at most ceil(prompts_per_step / size) + 1 times in it).
    """

    def __init__(self, size: int, prompts_per_step: int, seed: int) -> None:
        self.size = size
        self.prompts_per_step = prompts_per_step
        self.seed = seed
        self._epoch = lru_cache(maxsize=2)(self._permutation)

    def rows(self, step: int) -> list[int]:
        """The `prompts_per_step` rows of step 0, 1, 2, ..."""
        start = step * self.prompts_per_step
        places = (divmod(place, self.size) for place in range(start, start + self.prompts_per_step))
        return [self._epoch(epoch)[place] for epoch, place in places]

    def refill(self, step: int, taken: Collection[int], count: int, round: int) -> list[int]:
        """`count` random rows to replace some of the step's, beside the epochs: these rows' own turn comes all the same.

        Depends on the seed and the arguments alone. No row twice and none of `taken` while there are others; when they
        run out, all rows again.

        Args:
            taken: every row that the step had so far, those of earlier rounds included.
            round: of the step, from 0; each draws other rows.
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
