"""A number, within a relative tolerance."""

from fractions import Fraction

from mssr.rewards.extract import answered, right_answer
from mssr.rewards.mathematics.normalise import clean, squeeze
from mssr.rewards.mathematics.numbers import parse_number
from mssr.rewards.mathematics.units import parse_quantity
from mssr.rewards.option_checks import require_bool, require_number
from mssr.rewards.row import Row
from mssr.rewards.text import spelled

USES_IMAGES = False

MAX_CHARS = 200  # of a number


def number(response: str, row: Row, *, tolerance: float = 0.0, units: bool = False) -> float:
    """Return 1 if the response's answer is the right number, else 0. A right answer that is no number is compared as text.

    tolerance: relative to the right number: 0.05 is ChartQA's relaxed accuracy. units: ignore a unit, a currency or a percent
    sign; otherwise 50% is 0.5, and `5 kg` no number. Million and its like are units.
    """
    answer, said = right_answer(row), answered(response)
    right, found = _value(answer, units), _value(said, units)
    if right is None:
        return float(spelled(said) == spelled(answer))
    return float(found is not None and abs(found - right) <= Fraction(str(tolerance)) * abs(right))


def _value(text: str, units: bool) -> Fraction | None:
    """Return the number that the text is, however it is written: 1,000, 1e3, \\frac{1}{2}, five."""
    if len(text) > MAX_CHARS:
        return None
    text = squeeze(clean(text))
    scale = Fraction(1)
    if units:
        quantity = parse_quantity(text, gold=True)
        if quantity is None:
            return None
        text, scale = quantity.head, quantity.unit.scale if quantity.unit else scale
    elif text.endswith("%"):
        text, scale = text[:-1].rstrip(), Fraction(1, 100)
    found = parse_number(text) if text else None
    return found and found.value * scale


def _check(*, tolerance: float = 0.0, units: bool = False) -> None:
    require_number("tolerance", tolerance, at_least=0)
    require_bool("units", units)


number.check = _check
