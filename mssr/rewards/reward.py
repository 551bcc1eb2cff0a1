"""The reward of a response: the parts that its functions return, their weighted sum, and the success."""

from collections.abc import Mapping
from dataclasses import dataclass

from mssr.config.reward_keys import RESERVED, RewardConfig
from mssr.errors import UserError
from mssr.rewards.outcome import Failure, Outcome

MOST = 1e30  # of a reward: far from the largest float32


@dataclass(frozen=True)
class Grade:
    """What a response is worth.

    reward: weighted sum of the parts. success: the part `reward.success`, in [0, 1]. Both are 0 if a function failed.
    graded: False if loss and tracker must not see it. parts: by name, of the functions that did not fail.
    failures: by the function's label.
    """

    reward: float
    success: float
    graded: bool
    parts: dict[str, float]
    failures: dict[str, Failure]


def combine(outcomes: Mapping[str, Outcome], config: RewardConfig) -> Grade:
    """Combine what the functions, by their labels, returned for one response.

    Raises:
        UserError: two functions return the same part, or one has the name of a metric.
    """
    parts, failures, source = {}, {}, {}
    for label, outcome in outcomes.items():
        if outcome.failure is not None:
            failures[label] = outcome.failure
            continue
        for part, value in outcome.parts.items():
            _refuse_name(part, label, source)
            parts[part], source[part] = value, label
    if not failures and (wrong := _wrong_success(parts, config.success)):
        failures[source.get(config.success, next(iter(outcomes)))] = Failure("result", wrong)
    weighted = {part: config.weights.get(part, 1.0) * value for part, value in parts.items()}
    reward = sum(weighted.values())
    if not failures and not abs(reward) < MOST:
        largest = max(weighted, key=lambda part: abs(weighted[part]))
        failures[source[largest]] = Failure(
            "result", f"{largest} is {parts[largest]:g}, which is too much for a reward"
        )
    if failures:
        return Grade(0.0, 0.0, config.on_error != "skip", parts, failures)
    return Grade(reward, parts[config.success], True, parts, {})


def _refuse_name(part: str, label: str, source: Mapping[str, str]) -> None:
    if part in RESERVED:
        raise UserError(
            f"reward.function {label} returns a part {part!r}, but reward/{part} is a metric of its own; rename it"
        )
    if part in source:
        raise UserError(f"reward.function: {source[part]} and {label} both return a part {part!r}; rename one of them")


def _wrong_success(parts: Mapping[str, float], success: str) -> str | None:
    if success not in parts:
        return f"no part {success!r} (reward.success), only {', '.join(parts) or 'none'}; return it for every response"
    if not 0 <= parts[success] <= 1:
        return (
            f"{success} is {parts[success]:g}, and the part reward.success must be in [0, 1]; rescale it, or name another "
            "part as reward.success"
        )
    return None


def refuse_unknown_parts(found: set[str], config: RewardConfig) -> None:
    """Check settings against the parts that the functions have returned.

    Raises:
        UserError: there is no part `reward.success`, or none of the name of a weight.
    """
    names = ", ".join(sorted(found))
    if config.success not in found:
        raise UserError(
            f"reward.success {config.success}: no reward function returns this part; they return {names}: name one of them"
        )
    if unknown := sorted(config.weights.keys() - found):
        raise UserError(f"reward.weights.{unknown[0]}: no reward function returns this part; they return {names}")
