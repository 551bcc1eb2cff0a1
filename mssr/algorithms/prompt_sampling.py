"""Prompts of uncertain value more often: SPO's curriculum (arXiv 2509.13232). Shuffled epochs are in `mssr.data.sampler`."""

import random
from collections.abc import Sequence

import numpy as np

from mssr.algorithms.value_tracker import ValueTracker

EXPLORATION = 0.05  # weight of a row whose value is certain


class PrioritisedSampler:
    """Rows drawn with weight sqrt(v (1 - v)) + 0.05, v from the value tracker: SPO's curriculum (arXiv 2509.13232).

    Each row's weight is the standard deviation of its reward, and a little for rows that look settled. Without
    replacement within a step; there are no epochs: a row may come again in the next step, or not for many.

    A step's rows depend on the seed, the step and the tracker's state alone. So ranks whose trackers are equal draw the
    same, and a resumed run draws what it would have, if it asks for a step's rows when the tracker has seen the same
    steps.
    """

    def __init__(self, keys: Sequence[str], tracker: ValueTracker, prompts_per_step: int, seed: int) -> None:
        """keys: of row 0, 1, 2, ..., as the tracker knows them."""
        self.prompts_per_step = prompts_per_step
        self.seed = seed
        self._keys = keys
        self._tracker = tracker

    def rows(self, step: int) -> list[int]:
        """`prompts_per_step` rows in random order; no row twice, unless there are fewer than that."""
        # numpy's seeds are not negative; the standard library's hash of a text gives it one that is.
        generator = np.random.default_rng(random.Random(f"{self.seed}/{step}/prioritised").getrandbits(128))
        weights = self._weights()
        drawn, left = [], self.prompts_per_step
        while left:
            drawn.append(_weighted(weights, min(left, len(weights)), generator))
            left -= len(drawn[-1])
        return np.concatenate(drawn).tolist()

    def _weights(self) -> np.ndarray:
        value = self._tracker.values(self._keys).double().numpy()
        return np.sqrt(value * (1 - value)) + EXPLORATION


def _weighted(weights: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """`count` rows, one after the other with chance in proportion to weight, then shuffled.

    The `count` smallest of Exp(1) / weight are such a draw (Efraimidis and Spirakis, 2006). Shuffled, because the
    first of it have larger weights than the last, and a step's updates should all get the same mixture.
    """
    waiting = generator.standard_exponential(len(weights)) / weights
    return generator.permutation(np.argsort(waiting, kind="stable")[:count])
