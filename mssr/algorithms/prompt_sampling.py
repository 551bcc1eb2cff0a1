"""Prioritised prompt sampling, SPO's curriculum (arXiv 2509.13232). Shuffled epochs are in `mssr.data.sampler`."""

import random
from collections.abc import Sequence

import numpy as np

from mssr.algorithms.value_tracker import ValueTracker

EXPLORATION = 0.05  # weight of a row with v = 0 or 1


class PrioritisedSampler:
    """Draws rows with weight sqrt(v (1 - v)) + 0.05, v from the value tracker.

    sqrt(v (1 - v)) is the standard deviation of a reward of 0 or 1. Rows are drawn without replacement within a step;
    there are no epochs. The weight of a row's source multiplies its own.

    The rows of a step depend only on the seed, the step and the tracker's state. So ranks with equal trackers draw the
    same rows, and so does a resumed run.
    """

    def __init__(
        self,
        keys: Sequence[str],
        tracker: ValueTracker,
        prompts_per_step: int,
        seed: int,
        parts: Sequence[tuple[int, float]] = (),
    ) -> None:
        """keys: the tracker's key of each row. parts: number of rows and weight of each source; none: all weigh the same."""
        self.prompts_per_step = prompts_per_step
        self.seed = seed
        self._keys = keys
        self._tracker = tracker
        parts = parts or [(len(keys), 1.0)]
        self._of_source = np.repeat([weight for _, weight in parts], [rows for rows, _ in parts])

    def rows(self, step: int) -> list[int]:
        """Return `prompts_per_step` rows in random order, without repetition if there are enough rows."""
        # numpy needs a seed >= 0; `Random` hashes the text to one.
        generator = np.random.default_rng(random.Random(f"{self.seed}/{step}/prioritised").getrandbits(128))
        value = self._tracker.values(self._keys).double().numpy()
        weights = (np.sqrt(value * (1 - value)) + EXPLORATION) * self._of_source
        drawn, left = [], self.prompts_per_step
        while left:
            drawn.append(_weighted(weights, min(left, len(weights)), generator))
            left -= len(drawn[-1])
        return np.concatenate(drawn).tolist()


def _weighted(weights: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Draw `count` rows without replacement, with probability in proportion to weight, in random order.

    The `count` smallest values of Exp(1) / weight are such a draw (Efraimidis and Spirakis, 2006). They are shuffled because
    the first ones have larger weights, and every update of a step should get the same mixture.
    """
    waiting = generator.standard_exponential(len(weights)) / weights
    return generator.permutation(np.argsort(waiting, kind="stable")[:count])
