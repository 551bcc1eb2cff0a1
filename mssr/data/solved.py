"""`data.drop_solved`: epochs without the prompts whose value in the tracker is high enough."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from mssr.data.sampler import Part, PromptSampler

MIN_VISITS = 4  # of a prompt in training before its value counts; one lucky answer solves nothing


class Values(Protocol):
    """The value tracker, as far as it is asked here."""

    def values(self, keys: Sequence[str]) -> Tensor: ...


class Solved(NamedTuple):
    """epoch: the first one, from 0, in which the prompt is not drawn. value: in the tracker when that was decided."""

    epoch: int
    value: float


class UnsolvedSampler(PromptSampler):
    """Shuffled epochs, each without the rows that are solved when it is decided on.

    `decide(step)` decides on all epochs up to the end of that step; it must be called at the same point of every run, since
    it reads the tracker. Decisions are final and part of a checkpoint, so that a resumed run draws the same rows. Ranks with
    equal trackers decide alike.

    As many rows as a step has prompts always stay, those of the lowest values: a step never repeats a few rows.
    """

    def __init__(
        self,
        keys: Sequence[str],
        tracker: Values,
        threshold: float,
        prompts_per_step: int,
        seed: int,
        parts: Sequence[Part] = (),
    ) -> None:
        """keys: the tracker's key of each row."""
        super().__init__(len(keys), prompts_per_step, seed, parts)
        self.solved: dict[int, Solved] = {}
        self.all_solved = False
        self._keys = keys
        self._tracker = tracker
        self._threshold = threshold
        self._visits: Counter[str] = Counter()
        self._starts = [0]  # number of draws before each epoch that is decided, and before the next

    def observe(self, keys: Iterable[str]) -> None:
        """Count a visit of each of these prompts."""
        self._visits.update(keys)

    def decide(self, step: int) -> int:
        """Decide on every epoch that begins before the end of `step`; return the number of rows that are newly solved."""
        before = len(self.solved)
        while self._starts[-1] < (step + 1) * self.prompts_per_step:
            epoch = len(self._starts) - 1
            self._find_solved(epoch)
            self._starts.append(self._starts[-1] + len(self._epoch(epoch)))
        return len(self.solved) - before

    def state_dict(self) -> dict[str, Any]:
        return {
            "visits": dict(self._visits),
            "solved": {row: tuple(entry) for row, entry in self.solved.items()},
            "starts": list(self._starts),
            "all_solved": self.all_solved,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._visits = Counter(state["visits"])
        self.solved = {row: Solved(*entry) for row, entry in state["solved"].items()}
        self._starts = list(state["starts"])
        self.all_solved = state["all_solved"]
        self._epoch.cache_clear()

    def _find_solved(self, epoch: int) -> None:
        rows = [
            row for row in range(self.size) if row not in self.solved and self._visits[self._keys[row]] >= MIN_VISITS
        ]
        if not rows:
            return
        values = self._tracker.values([self._keys[row] for row in rows])
        reached = (values >= self._threshold).tolist()
        found = [(value, row) for value, row, there in zip(values.tolist(), rows, reached) if there]
        found.sort(key=lambda one: (-one[0], one[1]))
        most = self.size - len(self.solved) - min(self.size, self.prompts_per_step)
        self.all_solved = len(found) > most
        self.solved |= {row: Solved(epoch, value) for value, row in found[: max(0, most)]}

    def _start(self, epoch: int) -> int:
        return self._starts[epoch]

    def _epoch_of(self, place: int) -> int:
        if place >= self._starts[-1]:
            raise RuntimeError(f"draw {place} is in an epoch that is not decided yet")
        return bisect_right(self._starts, place) - 1

    def _drawn(self, epoch: int) -> Iterator[int]:
        for row in super()._drawn(epoch):
            if row not in self.solved or self.solved[row].epoch > epoch:
                yield row
