"""`reward.*`: the functions that judge a response, and how they run."""

import re
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field

from mssr.config.paths import expanded
from mssr.config.section import Section

ACCURACY = "accuracy"  # label of a function given as text
RESERVED = ("errors", "timeouts")  # reward/errors and reward/timeouts are metrics of their own
_BLIND = ("exact", "format", "overlong")  # they can do without the column `answer`, as a judge with its own template


class NamedFunction(NamedTuple):
    """A reward function as configured.

    reference: a built-in's name, `file.py:name` or `package.module:name`. timeout_s: its own, instead of the section's.
    """

    reference: str
    timeout_s: float | None
    options: dict[str, Any]

    @property
    def is_builtin(self) -> bool:
        return ":" not in self.reference


def _checked_functions(value: Any) -> Any:
    """Return the value of `reward.function` with `~` expanded; refuse what is neither of its forms.

    Raises:
        ValueError: says what is wrong, and where in the mapping.
    """
    if not isinstance(value, dict):
        return _checked_reference(value)
    if not value:
        raise ValueError("is empty; name at least one function, for example {accuracy: math}")
    return {label: _checked_entry(label, entry) for label, entry in value.items()}


def _checked_entry(label: Any, entry: Any) -> Any:
    if not isinstance(label, str) or not re.fullmatch(r"[\w-]+", label):
        raise ValueError(f"{label!r} is not a label; use letters, digits, - and _")
    if label in RESERVED:
        raise ValueError(f"reward/{label} is a metric of its own; give the function another label than {label}")
    try:
        if not isinstance(entry, dict):
            return _checked_reference(entry)
        if "function" not in entry:
            raise ValueError("names no function; write {function: NAME, ...} with its options")
        if any(not isinstance(option, str) or not option.isidentifier() for option in entry):
            raise ValueError("an option is not a Python name, and is passed to the function as a keyword argument")
        timeout_s = entry.get("timeout_s", 1)
        if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or not 0 < timeout_s < float("inf"):
            raise ValueError(f"timeout_s should be a number greater than 0, got {timeout_s!r}")
        return entry | {"function": _checked_reference(entry["function"])}
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from None


def _checked_reference(reference: Any) -> str:
    if not isinstance(reference, str):
        raise ValueError(f"expected a built-in's name, file.py:NAME or package.module:NAME, got {reference!r}")
    return expanded(reference)


class RewardConfig(Section):
    function: Annotated[str | dict[str, str | dict[str, Any]], BeforeValidator(_checked_functions)] = Field(
        "math",
        description="what judges a response: a built-in's name, path/to/file.py:NAME or package.module:NAME; several as "
        "{label: NAME} or {label: {function: NAME, option: value}}; docs/REWARDS.md",
    )
    weights: dict[str, Annotated[float, Field(strict=True)]] = Field(
        {}, description="factor of each part of the reward in their sum; 1 where none is set; 0: only logged"
    )
    success: str = Field(
        ACCURACY, description="the part in [0, 1] that the value tracker learns and that is the accuracy"
    )
    workers: int | None = Field(
        None,
        gt=0,
        description="processes per synchronous or batched function and rank; null: the rank's share of the cores, at most 8",
    )
    timeout_s: float = Field(5.0, gt=0, description="time limit of a call; the worker of a late one is killed")
    step_timeout_s: float = Field(
        300.0,
        gt=0,
        description="longest wait for the grading of a batch after its generation, per rank; "
        "later responses count as timed out",
    )
    memory_gib: float = Field(4.0, gt=0, description="memory limit of a worker")
    batch_size: int = Field(64, gt=0, description="most responses in a call of a batched function")
    on_error: Literal["zero", "skip", "fail"] = Field(
        "zero",
        description="a response whose function fails or is late: gets reward 0, is left out of loss and tracker, "
        "or ends the run",
    )

    @property
    def functions(self) -> dict[str, NamedFunction]:
        """The functions by their labels."""
        given = self.function if isinstance(self.function, dict) else {ACCURACY: self.function}
        return {label: self._named(entry) for label, entry in given.items()}

    def _named(self, entry: str | dict[str, Any]) -> NamedFunction:
        if isinstance(entry, str):
            return NamedFunction(entry, None, {})
        options = {name: value for name, value in entry.items() if name not in ("function", "timeout_s")}
        return NamedFunction(entry["function"], entry.get("timeout_s"), options)

    @property
    def success_weight(self) -> float:
        """Factor of the success in the reward."""
        return self.weights.get(self.success, 1.0)

    @property
    def needs_answer(self) -> bool:
        """Whether every row needs an `answer`: a built-in function compares the response with it."""
        return any(
            one.is_builtin and one.reference not in _BLIND and not one.options.get("template")
            for one in self.functions.values()
        )

    @property
    def known_parts(self) -> set[str] | None:
        """Names of the parts if they are known before the first call: each built-in returns one; None with others."""
        functions = self.functions
        return set(functions) if all(one.is_builtin for one in functions.values()) else None
