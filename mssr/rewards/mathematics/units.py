"""Units of measurement: their spellings, and how they compare.

A unit is a factor and dimensions: km/h is 5/18 of m^1 s^-1. Nouns (5 apples) and currencies are dimensions, too.
"""

import re
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from mssr.rewards.mathematics.numbers import CHINESE_DIGITS, NUMBER_WORDS, parse_number
from mssr.rewards.mathematics.vocabulary import is_constant


class Unit(NamedTuple):
    """value in base units = number * scale * factor. scale: of number words (million), which are never left out."""

    scale: Fraction
    factor: Fraction
    dimensions: tuple[tuple[str, int], ...]


_SI = {
    "m": ("m", 1), "g": ("g", 1), "s": ("s", 1), "N": ("N", 1), "J": ("J", 1), "W": ("W", 1), "V": ("V", 1), "A": ("A", 1),
    "Hz": ("Hz", 1), "Pa": ("Pa", 1), "L": ("m3", "0.001"), "l": ("m3", "0.001"), "mol": ("mol", 1), "\\Omega": ("Ω", 1),
    "eV": ("eV", 1), "C": ("C", 1), "T": ("T", 1),
}  # fmt: skip
_PREFIXES = {"": 1, "k": 1000, "M": 10**6, "G": 10**9, "c": "0.01", "d": "0.1", "m": "0.001", "\\mu": "0.000001",
             "n": "0.000000001"}  # fmt: skip
_OTHERS = {
    # name: (base, factor, other spellings)
    "min": ("s", 60, "minute mins 分钟"), "h": ("s", 3600, "hr hrs hour 小时 时"), "day": ("s", 86400, "days d 天 日"),
    "week": ("s", 604800, "周"), "month": ("month", 1, "月 个月"), "year": ("month", 12, "yr yrs 年 岁"),
    "second": ("s", 1, "sec secs 秒 秒钟"),
    "meter": ("m", 1, "metre 米"), "centimeter": ("m", "0.01", "centimetre 厘米"),
    "millimeter": ("m", "0.001", "millimetre 毫米"),
    "decimeter": ("m", "0.1", "decimetre 分米"), "kilometer": ("m", 1000, "kilometre 千米 公里"),
    "inch": ("m", "0.0254", "inches in 英寸"), "foot": ("m", "0.3048", "feet ft 英尺"), "yard": ("m", "0.9144", "yd yds"),
    "mile": ("m", "1609.344", "mi 英里"),
    "gram": ("g", 1, "gm gms 克"), "kilogram": ("g", 1000, "kilo kgs 千克 公斤"), "milligram": ("g", "0.001", "毫克"),
    "t": ("g", 10**6, "tonne 吨"), "ton": ("ton", 1, ""), "pound": ("g", "453.59237", "lb lbs"),
    "ounce": ("g", "28.349523125", "oz"),
    "liter": ("m3", "0.001", "litre 升"), "milliliter": ("m3", "0.000001", "millilitre ml 毫升 cc"),
    "hectare": ("m2", 10**4, "ha 公顷"),
    "gallon": ("gallon", 1, "gal"), "acre": ("acre", 1, ""),
    "newton": ("N", 1, "牛 牛顿"), "joule": ("J", 1, "焦 焦耳"), "watt": ("W", 1, "瓦"), "kWh": ("J", 3_600_000, ""),
    "kilowatt": ("W", 1000, "千瓦"),
    "volt": ("V", 1, "伏"), "ampere": ("A", 1, "amp 安 安培"), "ohm": ("Ω", 1, "欧 欧姆"), "hertz": ("Hz", 1, "赫兹"),
    "pascal": ("Pa", 1, "帕"), "kelvin": ("K", 1, "K"), "°C": ("°C", 1, "℃ celsius 摄氏度"),
    "°F": ("°F", 1, "fahrenheit"),
    "°": ("°", 1, "degree deg degs 度"), "rad": ("rad", 1, "radian 弧度"),
    "%": ("%", 1, "percent pct percentage"), "dB": ("dB", 1, "decibel"),
    "$": ("$", 1, "dollar USD US$ 美元"), "cent": ("$", "0.01", "¢"), "¥": ("¥", 1, "元 yuan RMB CNY 人民币"),
    "€": ("€", 1, "euro EUR 欧元"),
    "£": ("£", 1, "GBP 英镑"), "₹": ("₹", 1, "rupee Rs INR"), "yen": ("yen", 1, "JPY 日元"),
    "pp": ("pp", 1, ""), "unit": ("unit", 1, "单位"),
}  # fmt: skip
_SCALES = {
    "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12, "dozens": 12,
    "mil": 10**6, "mn": 10**6, "bn": 10**9, "百": 100, "千": 1000, "万": 10**4, "百万": 10**6, "千万": 10**7, "亿": 10**8,
}  # fmt: skip
# Lower-case words after a number that change what it says.
_NOT_COUNTED = """
    and or not no more less least most than over under above below about nearly negative minus plus to from between of off
    squared cubed factorial half halves third quarter fourth fifth sixth seventh eighth ninth tenth hundredth thousandth tens
    pair score hundreds thousands millions billions mod modulo times divided by into with without only exactly ratio remainder
    point is are was were be if for at on in up down left right else true false yes per the a an th st nd rd am pm
    sin cos tan cot sec csc log ln lg exp max min sqrt pi root radical choose add added subtract subtracted double doubled
    triple tripled halved multiply multiplied multiplying lakh crore gross wrong incorrect unknown first
"""
_NO_NOUNS = frozenset(_NOT_COUNTED.split()) | NUMBER_WORDS.keys() | _SCALES.keys()
_NUMBER_PART = re.compile(  # sixteenths, quadrillion
    r"[a-z]+illions?|(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|[a-z]+teen|[a-z]+tie|hundred|thousand|[a-z]+illion)ths?"
)
_NO_NOUNS_CHINESE = set(
    "万亿千百十半倍点分之成折多少以上下余几约负正不或和与的至到左右第零一二三四五六七八九两根号派角毛立平"
)


def _table() -> dict[str, tuple[str, Fraction]]:
    table = {}
    for prefix, power in _PREFIXES.items():
        for symbol, (base, factor) in _SI.items():
            table[prefix + symbol] = (base, Fraction(power) * Fraction(factor))
    for name, (base, factor, spellings) in _OTHERS.items():
        for spelling in (name, *spellings.split()):
            table[spelling] = (base, Fraction(factor))
            if len(spelling) > 2 and spelling.isascii() and spelling.isalpha():
                table.setdefault(spelling + "s", (base, Fraction(factor)))
    return table


_UNITS = _table()
_SPELLINGS = {
    "mph": "mile/h", "mpg": "mile/gallon", "kmh": "km/h", "kph": "km/h", "kmph": "km/h", "per cent": "%",
    "percentage points": "pp", "percentage point": "pp", "百分点": "pp", "个百分点": "pp",
}  # fmt: skip
_POWERS = (("square ", 2), ("sq ", 2), ("sq.", 2), ("cubic ", 3), ("平方", 2), ("立方", 3))
_CURRENCY = re.compile(r"([+-]?)(US\$|[$¥€£₹]|(?:USD|EUR|GBP|CNY|RMB|INR|JPY|Rs) ?)(?=[\d.])")
_ABBREVIATIONS = {"k": "thousand", "m": "million", "b": "billion", "bn": "billion"}
# 100k, 1.2M, $5m. 5M may be anything, 300K a temperature.
_ABBREVIATED = re.compile(
    r"([+-]?(?:(?:US\$|[$¥€£₹])\d[\d,.]*(?=[kKmMbB])|\d[\d,]*(?=k|bn)|\d+\.\d+(?=[kMB]|bn))) ?([kKmMbB]|bn)"
)
_PIECE = r"(\d+(?:\.\d+)?) ?([^\d\s.,;+-]++)"
_COMPOUND = re.compile(rf"{_PIECE}(?:,? ?(?:and )?{_PIECE})+")
_ARC = {"'": Unit(Fraction(1), Fraction(1, 60), (("°", 1),)), "''": Unit(Fraction(1), Fraction(1, 3600), (("°", 1),))}
_FACTOR = re.compile(r"(.*?)(?:\^\{?(-?\d)\}?|(?<=[a-zA-Z])(-?[23])| (squared|cubed))?")


@lru_cache(4096)
def parse_unit(text: str) -> Unit | None:
    r"""Return the unit that is written as `text`: `cm^{2}`, `m/s`, `km per hour`, `平方厘米`, `million dollars`, `apples`."""
    text = text.strip()
    if not text or len(text) > 40:
        return None
    text = re.sub(r" per (?:a )?|每", "/", text)
    text = re.sub(r"\b(?:US|U\.S\.|American) ?(?=dollars?$)", "", text)
    text = re.sub(r"degrees? (?=celsius|fahrenheit)", "", text, flags=re.IGNORECASE)
    text = re.sub(r"/\(([^()]+)\)", lambda found: "/" + re.sub(r"\\cdot ?|\*", "/", found[1]), text)
    text = re.sub(r"^ms(?=\^\{-)", r"m\\cdot s", text.replace("\\mu ", "\\mu"))
    text = _SPELLINGS.get(text, text)
    scale = Fraction(1)
    first, _, rest = text.partition(" ")
    if first in _SCALES:
        scale, text = Fraction(_SCALES[first]), rest
    elif text[:1] in "百千万亿":
        size = 2 if text[:2] in _SCALES else 1
        if text[:size] + text[size : size + 1] not in _UNITS and text[: size + 1] not in _UNITS:
            scale, text = Fraction(_SCALES[text[:size]]), text[size:]
    if not text:
        return Unit(scale, Fraction(1), ())
    found = _product(text) or _noun(text)
    return found and Unit(scale, *found)


def _product(text: str) -> tuple[Fraction, tuple[tuple[str, int], ...]] | None:
    factor, dimensions = Fraction(1), {}
    for position, part in enumerate(text.split("/")):
        sign = -1 if position else 1
        for piece in re.split(
            r"\\cdot ?|\*|(?<=\w)-(?=[a-zA-Z])|(?<!square)(?<!cubic)(?<!sq)(?<!sq\.) (?!squared|cubed)", part.strip()
        ):
            power = 1
            for word, exponent in _POWERS:
                if piece.lower().startswith(word):
                    piece, power = piece[len(word) :], exponent
            matched = _FACTOR.fullmatch(piece)
            name = matched[1].strip()
            exponent = int(matched[2] or matched[3] or {"squared": 2, "cubed": 3}.get(matched[4], 1))
            known = _UNITS.get(name) or (_UNITS.get(name.lower()) if len(name) > 2 else None)
            if known is None:
                return None
            base, size = known
            power *= sign * exponent
            factor *= size**power
            base, own = (base[0], int(base[1])) if base in ("m2", "m3") else (base, 1)
            dimensions[base] = dimensions.get(base, 0) + power * own
    return factor, tuple(sorted(item for item in dimensions.items() if item[1]))


def _noun(text: str) -> tuple[Fraction, tuple[tuple[str, int], ...]] | None:
    if re.fullmatch(r"[a-z]{3,}(?: [a-z]{3,}){0,2}", text):
        each = text.split()
        singular = [word.removesuffix("s") for word in each]
        if _NO_NOUNS.isdisjoint(each + singular) and not any(map(_NUMBER_PART.fullmatch, each)):
            return Fraction(1), ((text.removesuffix("s"), 1),)
    elif re.fullmatch("[\u4e00-\u9fff]{1,4}", text) and _NO_NOUNS_CHINESE.isdisjoint(text):
        return Fraction(1), ((text, 1),)
    return None


DEGREE, RADIAN = parse_unit("°"), parse_unit("rad")


class Quantity(NamedTuple):
    head: str
    unit: Unit | None


def _compound(pieces: list[tuple[str, str]]) -> Quantity | None:
    """Add up 1 hour 30 minutes, 36°52'."""
    first, *others = units = [_ARC.get(name) or parse_unit(name) for _, name in pieces]
    if None in units or any(unit.dimensions != first.dimensions for unit in others):
        return None
    if any(one.factor <= other.factor for one, other in pairwise(units)):
        return None
    value = sum(Fraction(number) * unit.factor for (number, _), unit in zip(pieces, units)) / first.factor
    return Quantity(f"\\frac{{{value.numerator}}}{{{value.denominator}}}", first)


def parse_quantity(text: str, gold: bool) -> Quantity | None:
    """Split a constant from its unit; None if the text is not a constant with or without a unit.

    A letter right behind a number may be a variable: `5m` of a prediction has a unit, `5m` of the right answer has not.
    """
    if found := _ABBREVIATED.fullmatch(text):
        text = f"{found[1]} {_ABBREVIATIONS[found[2].lower()]}"
    if _COMPOUND.fullmatch(text) and (found := _compound(re.findall(_PIECE, text))):
        return found
    if found := _CURRENCY.match(text):
        inner = parse_quantity(found[1] + text[found.end() :], gold)
        if inner is None or (inner.unit and inner.unit.dimensions):
            return None
        scale = inner.unit.scale if inner.unit else Fraction(1)
        return Quantity(inner.head, parse_unit(found[2].strip())._replace(scale=scale))
    if parse_number(text) is not None or is_constant(text):
        return Quantity(text, None)
    for place in range(max(1, len(text) - 40), len(text)):
        head, tail = text[:place], text[place:]
        if tail[0].isdigit() or tail[0] in " )}^_" or not head.strip():
            continue
        if head[-1].isalpha() and head[-1].isascii() and tail[0].isalpha() and tail[0].isascii():
            continue
        head = head.rstrip()
        if head[-1] in CHINESE_DIGITS and tail != "个" and not _product(tail):  # 四边形
            continue
        spaced = text[place - 1] == " "
        glued = not spaced and len(tail) == 1 and tail.isalpha() and tail.isascii()
        if glued and (gold or tail not in "mghsLNVJW" or re.fullmatch(r"\d{1,3}|\d+\.\d+", head) is None):
            continue
        if not spaced and tail[0].isascii() and _noun(tail) and not _product(tail):  # 11larg: a word that broke off
            continue
        if (parse_number(head) is None and (not is_constant(head) or "\\times" in head)) or (
            unit := parse_unit(tail)
        ) is None:
            continue
        return Quantity(head, unit)
    return None
