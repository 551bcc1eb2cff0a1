"""The reward of a response: whether its boxed answer is right, and whether it has the requested format."""

import math
from typing import NamedTuple

from mssr.config.reward_keys import RewardConfig
from mssr.rewards.extract import last_boxed, well_formed
from mssr.rewards.mathematics.equal import equal


class Reward(NamedTuple):
    """reward: in [0, 1]. correct: 1 if the answer is right, else 0."""

    reward: float
    correct: float


class RewardFunction:
    """reward = (1 - w) * correct + w * well_formed, w = `reward.format_weight`."""

    def __init__(self, config: RewardConfig) -> None:
        self.format_weight = config.format_weight

    @property
    def timeouts(self) -> int:
        """Comparisons so far that were killed, or left out because the time was over; they count as wrong."""
        return 0

    def __call__(self, response: str, answer: str, within_s: float = math.inf) -> Reward:
        """Grade a response. answer: the right one. within_s: time that is left for the symbolic check."""
        correct = float(self.is_correct(response, answer, within_s))
        reward = (1 - self.format_weight) * correct + self.format_weight * well_formed(response)
        return Reward(reward, correct)

    def is_correct(self, response: str, answer: str, within_s: float = math.inf) -> bool:
        r"""Whether the last `\boxed{}` has the right answer; the right number anywhere else does not count."""
        boxed = last_boxed(response)
        return boxed is not None and equal(boxed, answer)

    def close(self) -> None:
        pass
