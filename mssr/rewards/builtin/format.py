"""Format: whether the whole response matches a regular expression, or thinks and then boxes an answer."""

import re

from mssr.errors import UserError
from mssr.rewards.extract import well_formed
from mssr.rewards.row import Row

USES_IMAGES = False


def format(response: str, row: Row, *, pattern: str | None = None) -> float:
    r"""Return 1 if the response has the format, else 0.

    pattern: of the whole response, where `.` matches line ends too. Without one the format is one <think>...</think> with
    nothing before it, and after it one `\boxed{}` that is not empty.
    """
    if pattern is None:
        return float(well_formed(response))
    return float(re.fullmatch(pattern, response, re.DOTALL) is not None)


def _check(*, pattern: str | None = None) -> None:
    try:
        re.compile("" if pattern is None else pattern)
    except (TypeError, re.error) as error:
        raise UserError(f"pattern: {pattern!r} is not a regular expression: {error}") from None


format.check = _check
