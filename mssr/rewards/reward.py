"""The reward of a response: whether its boxed answer is right, and whether it has the requested format."""

from collections.abc import Sequence
from dataclasses import dataclass

from mssr.config import RewardConfig
from mssr.errors import UserError
from mssr.rewards.extract import last_boxed, well_formed
from mssr.rewards.symbolic import SymbolicChecker


@dataclass(frozen=True)
class Rewards:
    """Rewards of B responses, in [0, 1], and whether each answer is right, 0 or 1."""

    reward: list[float]
    correct: list[float]


class RewardFunction:
    """reward = (1 - w) * correct + w * well_formed, w = `reward.format_weight`."""

    def __init__(self, config: RewardConfig) -> None:
        self.format_weight = config.format_weight
        self.checker = SymbolicChecker(config.timeout_s)

    def __call__(self, responses: Sequence[str], answers: Sequence[str]) -> Rewards:
        """Grade B responses. answers: the right answers, one per response."""
        weight = self.format_weight
        correct = [float(self.is_correct(*pair)) for pair in zip(responses, answers, strict=True)]
        formed = [float(well_formed(response)) for response in responses]
        reward = [(1 - weight) * c + weight * f for c, f in zip(correct, formed, strict=True)]
        check_in_unit_interval(reward, "reward")
        return Rewards(reward, correct)

    def is_correct(self, response: str, answer: str) -> bool:
        r"""Whether the last `\boxed{}` has the right answer; the right number anywhere else does not count."""
        boxed = last_boxed(response)
        return boxed is not None and self.checker.equal(boxed, answer)

    def close(self) -> None:
        self.checker.close()


def check_in_unit_interval(rewards: Sequence[float], what: str) -> None:
    """Refuse values that a Beta tracker cannot take, NaN included.

    Raises:
        UserError: names the first offending row.
    """
    for row, reward in enumerate(rewards):
        if not 0 <= reward <= 1:
            raise UserError(
                f"{what}: row {row} is {reward}, outside [0, 1]; the value tracker counts successes, rescale it"
            )
