"""Rewards of responses."""

from contextlib import closing

import pytest

from mssr.config.reward_keys import RewardConfig
from mssr.rewards.reward import RewardFunction

RESPONSES = [
    r"<think>3 7</think>\boxed{10}",  # right and well-formed
    r"\boxed{10}",  # right only
    r"<think>3 7</think>\boxed{4}",  # well-formed only
    "<think>3 7</think>10",  # right number, no box: wrong
    r"\boxed{10} or \boxed{4}",  # the last box counts
]


@pytest.mark.parametrize(
    ("weight", "reward"), [(0.0, [1, 1, 0, 0, 0]), (0.25, [1, 0.75, 0.25, 0, 0]), (1.0, [1, 0, 1, 0, 0])]
)
def test_reward_weighs_answer_and_format(weight, reward):
    with closing(RewardFunction(RewardConfig(format_weight=weight))) as rewards:
        found = [rewards(response, "10") for response in RESPONSES]
    assert [one.reward for one in found] == reward
    assert [one.correct for one in found] == [1, 1, 0, 0, 0]
    assert all(isinstance(value, float) for one in found for value in one)


def test_answers_are_compared_as_mathematics_and_late_ones_are_wrong():
    with closing(RewardFunction(RewardConfig(timeout_s=1.0))) as rewards:
        assert rewards(r"\boxed{9^{9^{9^{9}}}}", "5").correct == 0.0
        assert rewards(r"\boxed{\frac12}", "0.5").correct == 1.0
        assert rewards.timeouts == 1
