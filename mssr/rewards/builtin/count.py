"""A count: how many there are of something."""

import re

from mssr.errors import UserError
from mssr.rewards.extract import answered, right_answer
from mssr.rewards.mathematics.normalise import clean
from mssr.rewards.mathematics.numbers import parse_number
from mssr.rewards.option_checks import require_number
from mssr.rewards.row import Row

USES_IMAGES = False

_NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?!\w)", re.ASCII)
MAX_CHARS = 1024  # of an answer, and the line that it stands in


def count(response: str, row: Row, *, partial: int = 0) -> float:
    """Return 1 if the response's answer has the right integer and no other number, else 0.

    partial: the largest difference that is worth something: with 3, answers that are 1, 2, 3 off get 3/4, 2/4, 1/4.
    """
    right = _whole(right_answer(row))
    if right is None:
        raise UserError(f"the answer {row.answer[:80]!r} is not a count: it must have one integer of at least 0")
    found = _whole(answered(response))
    return 0.0 if found is None else max(0.0, 1 - abs(found - right) / (partial + 1))


def _whole(text: str) -> int | None:
    """Return the integer of the text: the text itself, in digits or words, or the only one in it."""
    if len(text) > MAX_CHARS:
        return None
    text = clean(text)
    alone = parse_number(text)
    found = {alone} if alone else {parse_number(each.rstrip(",")) for each in _NUMBER.findall(text)}
    if len(found) != 1 or (one := found.pop()) is None or one.value < 0 or one.value.denominator != 1:
        return None
    return int(one.value)


def _check(*, partial: int = 0) -> None:
    require_number("partial", partial, at_least=0, whole=True)


count.check = _check
