"""Numbers as answers write them: 1,000  1e-3  6.02\\times10^{23}  \\frac{1}{2}  1\\frac{1}{2}  0.\\overline{3}  five."""

import re
from fractions import Fraction
from typing import NamedTuple

TOLERANCE = Fraction(1, 10**6)  # relative
MIN_DIGITS = 6  # significant digits that a rounded value needs: 0.333333 is 1/3, 0.33 is not
_FLOAT_DIGITS = 15  # from here on, a decimal is taken for a float that was printed in full
_MAX_EXPONENT = 400

_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+)"
_NUMBER = re.compile(
    rf"(?P<mantissa>{_DECIMAL})(?:[eE](?P<e>[+-]?\d+)|(?:\\times|\\cdot|\*)10(?:\^\{{(?P<ten>[+-]?\d+)\}})?)?", re.ASCII
)
_POWER_OF_TEN = re.compile(r"10\^\{(?P<ten>[+-]?\d+)\}", re.ASCII)
_FRACTION = re.compile(
    r"(?P<whole>\d++(?: |(?=\\)))?"  # 11/2 is eleven halves
    rf"(?:\\frac\{{(?P<sign>-?)(?P<a>{_DECIMAL})\}}\{{(?P<b>{_DECIMAL})\}}|(?P<c>{_DECIMAL})/(?P<d>{_DECIMAL}))",
    re.ASCII,
)
_REPEATING = re.compile(r"(\d+)\.(\d*)(?:\\overline\{(\d+)\}|\\dot\{(\d)\}(?:(\d*)\\dot\{(\d)\})?)", re.ASCII)
_SPELLED = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
_SPELLED_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_TENS = {word: 10 * tens for tens, word in enumerate(_SPELLED_TENS.split(), 2)}
NUMBER_WORDS = {word: value for value, word in enumerate(_SPELLED.split())} | _TENS

_PARTS = {"half": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "eighth": 8, "tenth": 10}
CHINESE_DIGITS = "零一二三四五六七八九十百两"


def _in_words() -> dict[str, Fraction]:
    """Return one hundred and twenty five, two thirds, two and a half, 二十五, 一百零五, 三分之二 and their like."""
    spelled, units = dict(NUMBER_WORDS), _SPELLED.split()[1:10]
    for many, unit in enumerate(units, 1):
        spelled |= {f"{word} {unit}": tens + many for word, tens in _TENS.items()}
    parts = {"half": Fraction(1, 2)} | {f"a {part}": Fraction(1, size) for part, size in _PARTS.items()}
    for part, size in _PARTS.items():
        parts |= {
            f"{unit} {part}{'s' * (many > 1)}": Fraction(many, size) for many, unit in enumerate(units[: size - 1], 1)
        }
    mixed = {f"{word} and {part}": value + parts[part] for word, value in spelled.items() for part in parts if value}
    hundreds = {
        f"{unit} hundred{link}{word}": 100 * many + value
        for many, unit in enumerate(units, 1) for link in (" ", " and ") for word, value in spelled.items() if value
    }  # fmt: skip
    chinese = {"零": 0}
    for value in range(1, 1000):
        hundred, ten, unit = value // 100, value // 10 % 10, value % 10
        text = f"{CHINESE_DIGITS[hundred]}百" * (hundred > 0) + f"{CHINESE_DIGITS[ten]}十" * (ten > 0)
        text += "零" * (ten == 0 < hundred and unit > 0) + CHINESE_DIGITS[unit] * (unit > 0)
        chinese[text.removeprefix("一") if 10 <= value < 20 else text] = value
    divided = {
        f"{below}分之{above}": Fraction(value, size)
        for below, size in chinese.items() for above, value in chinese.items() if 0 < value < size <= 10
    }  # fmt: skip
    return spelled | parts | mixed | hundreds | chinese | divided


_IN_WORDS = _in_words()


class Number(NamedTuple):
    """digits: significant digits that were written, places: those after the point. None: an exact value."""

    value: Fraction
    digits: int | None = None
    places: int = 0


def parse_number(text: str) -> Number | None:
    """Return the number that the squeezed text writes, or None."""
    sign = -1 if text.startswith("-") else 1
    if text.startswith(("+", "-")):
        text = text[1:].lstrip()
    if (spelled := _IN_WORDS.get(text.lower().replace("-", " ").replace("两", "二"))) is not None:
        return Number(Fraction(sign * spelled))
    if found := _NUMBER.fullmatch(text):
        return _scientific(found, sign)
    if found := _POWER_OF_TEN.fullmatch(text):
        exponent = int(found["ten"][:6])
        return Number(sign * Fraction(10) ** exponent) if abs(exponent) <= _MAX_EXPONENT else None
    if found := _FRACTION.fullmatch(text):
        return _fraction(found, sign)
    if found := _REPEATING.fullmatch(text):
        start, repeated = found[2], found[3] or found[4] + (found[5] or "") + (found[6] or "")
        value = Fraction(
            int(found[1] + start + repeated) - int(found[1] + start), 10 ** len(start) * (10 ** len(repeated) - 1)
        )
        return Number(sign * value)
    return None


def _scientific(found: re.Match, sign: int) -> Number | None:
    mantissa = found["mantissa"].replace(",", "")
    exponent = found["e"] or found["ten"] or ("1" if "10" in found[0][len(found["mantissa"]) :] else "0")
    if len(exponent) > 5 or abs(int(exponent)) > _MAX_EXPONENT:
        return None
    value = (
        sign * Fraction(mantissa if not mantissa.startswith(".") else "0" + mantissa) * Fraction(10) ** int(exponent)
    )
    whole, _, decimals = mantissa.partition(".")
    if not decimals:
        return Number(value)
    return Number(value, max(1, len((whole + decimals).lstrip("0"))), len(decimals) - int(exponent))


def _fraction(found: re.Match, sign: int) -> Number | None:
    above, below = found["a"] or found["c"], found["b"] or found["d"]
    if found["sign"]:
        sign = -sign
    above, below = Fraction(above.replace(",", "")), Fraction(below.replace(",", ""))
    return Number(sign * (int(found["whole"] or 0) + above / below)) if below else None


def close(left: Number, right: Number) -> bool:
    """Whether two numbers are equal: exactly, or as far as a decimal was written out.

    A decimal equals what rounds to it, within TOLERANCE and with at least MIN_DIGITS digits. Integers and fractions are
    exact, so 10^{-19} and 10^{-20} differ.
    """
    if left.value == right.value:
        return True
    if left.digits is None and right.digits is None:
        return False
    if abs(left.value - right.value) > TOLERANCE * max(abs(left.value), abs(right.value)):
        return False
    short, long = sorted((left, right), key=lambda number: (number.digits is None, number.digits or 0))
    if long.digits is None:
        return short.digits >= (MIN_DIGITS if long.value.denominator > 1 else _FLOAT_DIGITS)
    if long.digits >= _FLOAT_DIGITS:
        return True
    return short.digits >= MIN_DIGITS and _rounded(long.value, short.places) == short.value


def _rounded(value: Fraction, places: int) -> Fraction:
    """Round half away from zero."""
    power = Fraction(10) ** places
    scaled = abs(value) * power + Fraction(1, 2)
    return (scaled.numerator // scaled.denominator) / power * (-1 if value < 0 else 1)
