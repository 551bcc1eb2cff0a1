"""The reward of a response: whether its boxed answer is right, and whether it has the requested format."""

from typing import NamedTuple

from mssr.config.schema import RewardConfig
from mssr.rewards.extract import last_boxed, well_formed
from mssr.rewards.symbolic import SymbolicChecker


class Reward(NamedTuple):
    """reward: in [0, 1]. correct: 1 if the answer is right, else 0."""

    reward: float
    correct: float


class RewardFunction:
    """reward = (1 - w) * correct + w * well_formed, w = `reward.format_weight`."""

    def __init__(self, config: RewardConfig) -> None:
        self.format_weight = config.format_weight
        self.checker = SymbolicChecker(config.timeout_s)

    def __call__(self, response: str, answer: str) -> Reward:
        """Grade a response. answer: the right one."""
        correct = float(self.is_correct(response, answer))
        reward = (1 - self.format_weight) * correct + self.format_weight * well_formed(response)
        return Reward(reward, correct)

    def is_correct(self, response: str, answer: str) -> bool:
        r"""Whether the last `\boxed{}` has the right answer; the right number anywhere else does not count."""
        boxed = last_boxed(response)
        return boxed is not None and self.checker.equal(boxed, answer)

    def close(self) -> None:
        self.checker.close()
