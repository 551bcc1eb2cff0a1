"""The reward of a response from what its functions returned."""

import pytest

from mssr.config.reward_keys import RewardConfig
from mssr.errors import UserError
from mssr.rewards.outcome import Failure, Outcome
from mssr.rewards.reward import combine, refuse_unknown_parts


def returned(**parts):
    return Outcome(parts, None, 0.1)


def failed(kind="error", message="KeyError: 'level'"):
    return Outcome(None, Failure(kind, message), 0.1)


def test_one_function_is_the_reward():
    grade = combine({"accuracy": returned(accuracy=0.3)}, RewardConfig())
    assert grade.reward == grade.success == 0.3 and grade.graded and not grade.failures
    assert grade.parts == {"accuracy": 0.3}


def test_parts_are_weighted_and_only_the_success_is_in_the_unit_interval():
    config = RewardConfig(weights={"quality": 0.5, "length": -2.0, "seen": 0.0}, success="quality")
    grade = combine({"judge": returned(quality=0.5, seen=7.0), "length": returned(length=3.0, bonus=1.0)}, config)
    assert grade.reward == 0.25 - 6 + 1 and grade.success == 0.5
    assert grade.parts == {"quality": 0.5, "seen": 7.0, "length": 3.0, "bonus": 1.0}


@pytest.mark.parametrize(("on_error", "graded"), [("zero", True), ("skip", False), ("fail", True)])
def test_a_response_that_one_function_failed_on_has_no_reward_of_the_others(on_error, graded):
    outcomes = {"accuracy": returned(accuracy=1.0), "short": failed()}
    grade = combine(outcomes, RewardConfig(on_error=on_error))
    assert (grade.reward, grade.success, grade.graded) == (0.0, 0.0, graded)
    assert grade.parts == {"accuracy": 1.0} and grade.failures == {"short": outcomes["short"].failure}


@pytest.mark.parametrize("value", [1.5, -0.1])
def test_a_success_outside_of_the_unit_interval_is_a_failure(value):
    grade = combine({"a": returned(bonus=1.0), "b": returned(accuracy=value)}, RewardConfig())
    assert (grade.reward, grade.success) == (0.0, 0.0)
    assert list(grade.failures) == ["b"] and grade.failures["b"].kind == "result"
    assert grade.failures["b"].message.startswith(
        f"accuracy is {value:g}, and the part reward.success must be in [0, 1]"
    )


@pytest.mark.parametrize("value", [1e39, -1e308])
def test_a_reward_that_float32_does_not_hold_is_a_failure(value):
    grade = combine(
        {"accuracy": returned(accuracy=1.0), "b": returned(bonus=value)}, RewardConfig(weights={"bonus": 9})
    )
    assert (grade.reward, grade.success) == (0.0, 0.0)
    assert grade.failures == {"b": Failure("result", f"bonus is {value:g}, which is too much for a reward")}
    assert combine({"b": returned(accuracy=1.0, bonus=value)}, RewardConfig(weights={"bonus": 0})).reward == 1


def test_a_response_without_a_success_is_a_failure():
    grade = combine({"a": returned(bonus=1.0)}, RewardConfig())
    assert (
        grade.failures["a"].message == "no part 'accuracy' (reward.success), only bonus; return it for every response"
    )


def test_two_functions_do_not_return_the_same_part():
    with pytest.raises(
        UserError, match=r"^reward\.function: accuracy and judge both return a part 'accuracy'; rename one"
    ):
        combine({"accuracy": returned(accuracy=1.0), "judge": returned(accuracy=0.0)}, RewardConfig())


def test_a_part_has_no_name_of_a_metric():
    with pytest.raises(UserError, match=r"^reward\.function accuracy returns a part 'errors', but reward/errors is"):
        combine({"accuracy": returned(accuracy=1.0, errors=2.0)}, RewardConfig())


@pytest.mark.parametrize(
    "settings, line",
    [
        (
            {"success": "acc"},
            "reward.success acc: no reward function returns this part; they return accuracy, short: name",
        ),
        (
            {"weights": {"sort": 0.5}},
            "reward.weights.sort: no reward function returns this part; they return accuracy, short",
        ),
    ],
)
def test_settings_that_name_parts_that_there_are_not(settings, line):
    found = {"short", "accuracy"}
    with pytest.raises(UserError) as refused:
        refuse_unknown_parts(found, RewardConfig(**settings))
    assert str(refused.value).startswith(line)
    refuse_unknown_parts(found, RewardConfig(weights={"short": 0.5}))
