"""What a call of a reward function came to."""

from typing import Literal, NamedTuple


class Failure(NamedTuple):
    """kind "result": the function did not return a finite number, or numbers by name."""

    kind: Literal["timeout", "error", "died", "memory", "result"]
    message: str
    traceback: str = ""


class Outcome(NamedTuple):
    """parts or failure, the other is None. seconds: duration of the call, or of its batch."""

    parts: dict[str, float] | None
    failure: Failure | None
    seconds: float
