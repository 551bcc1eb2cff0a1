"""Rewards of responses."""

from contextlib import closing

import pytest

from mssr.config import RewardConfig
from mssr.errors import UserError
from mssr.rewards.reward import RewardFunction, check_in_unit_interval

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
        result = rewards(RESPONSES, ["10"] * 5)
    assert result.reward == reward
    assert result.correct == [1, 1, 0, 0, 0]
    assert all(isinstance(value, float) for value in result.reward + result.correct)


def test_answers_are_compared_as_mathematics_and_late_ones_are_wrong():
    with closing(RewardFunction(RewardConfig(timeout_s=1.0))) as rewards:
        assert rewards([r"\boxed{9^{9^{9^{9}}}}", r"\boxed{\frac12}"], ["5", "0.5"]).correct == [0.0, 1.0]
        assert rewards.checker.timeouts == 1


def test_answers_must_match_responses():
    with pytest.raises(ValueError):
        RewardFunction(RewardConfig())(["a", "b"], ["a"])


@pytest.mark.parametrize("bad", [1.5, -0.1, float("nan"), float("inf")])
def test_rewards_outside_the_unit_interval(bad):
    check_in_unit_interval([0.0, 0.5, 1.0], "reward")
    with pytest.raises(UserError, match=rf"^mine: row 2 is {bad}, outside \[0, 1\]; "):
        check_in_unit_interval([0.0, 1.0, bad, bad], "mine")
