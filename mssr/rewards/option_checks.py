"""Checks of the options of built-in rewards."""

import math
from typing import Any

from mssr.errors import UserError


def require_number(name: str, value: Any, *, at_least: float, at_most: float = math.inf, whole: bool = False) -> None:
    """Raise a UserError unless the option's value is a number in the range; whole: an integer."""
    fits = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not fits or not at_least <= value <= at_most or math.isinf(value):
        kind = "an integer" if whole else "a number"
        limits = f"of at least {at_least}" if at_most == math.inf else f"from {at_least} to {at_most}"
        raise UserError(f"{name}: must be {kind} {limits}, got {value!r}")


def require_bool(name: str, value: Any) -> None:
    """Raise a UserError unless the option's value is true or false."""
    if not isinstance(value, bool):
        raise UserError(f"{name}: must be true or false, got {value!r}")
