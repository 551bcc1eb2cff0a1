"""Boxed mathematics: whether the last box says what the answer says, as numbers, units, words, structure or formulas."""

from mssr.rewards.extract import last_boxed, right_answer
from mssr.rewards.mathematics.equal import equal
from mssr.rewards.row import Row

USES_IMAGES = False


def math(response: str, row: Row) -> float:
    r"""Return 1 if the last `\boxed{}` equals the row's answer, else 0. The right answer anywhere else does not count."""
    boxed = last_boxed(response)
    return float(boxed is not None and equal(boxed, right_answer(row)))
