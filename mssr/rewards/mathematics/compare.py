"""Decides whether two answers say the same: options, quantities, lists, equations, intervals, mathematics, words.

Both are normalised first, then tried as these kinds, in this order. Structure is compared here, part by part; only a part
that is mathematics, and nothing else, reaches the library. Where a reading is ambiguous, answers are different: a reward
for a wrong answer is worse than none.

- A unit may be missing on one side (`30°` and `30`); two units must be the same, or convert (`5 m` and `500 cm`).
- `x=5` equals `5`, but not `y=5`. `\\leq 5` and `\\neq 5` equal only their kind.
- Bare lists and sets have no order (`1, 2` and `2, 1`); tuples and intervals have one, and their brackets count.
- "and" and "or" are the same between values (`1 and 2` and `1 or 2`), not between conditions and words.
- `x_{1}=2, x_{2}=3` are solutions: they have no order, and may be called x. Other names with indices stay apart.
- A value after ≈ counts if it is the rounded value before it (`4\\pi\\approx 12.57`).
- An option letter counts with its text, unless the text takes it back or names another option (`A. not B`). `b` counts
  for `B`, not `B` for `b`, which may be a symbol.
- `1<x<2` equals `1<x and x<2` and `(1,2)`, but a predicted `(1,2)` may be a point.
- A tuple is no list of alternatives: `(2,3)` is not `x=2 or x=3`. `[1,2]` may be an interval, `[yes,no]` may not.
- A column is a tuple, but no interval; `[[1,2],[3,4]]` is a matrix. Vectors are added, but not multiplied.
- Radians and degrees convert if both are written. `100k` is a number, `300K` is not, and `4 percentage points` are not `4%`.
- `3 to 5` equals `3:5`, `\\frac{3}{5}` and `3-5`; `2:4` equals `1:2`. A time (`1:20`) is not reduced, `18-29` not computed.
- Parallel, perpendicular, congruent and similar have no direction, nor have segments, lines and angles.
- Letters side by side are a word (`left` is not `felt`, `AB` is not `BA`), unless operators or digits are beside them.
- `Yes, because 3<5` equals `Yes`; of two explanations, each must say the same.
- Case is ignored in words of three letters or more, not in symbols, formulas and names of points.
"""

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache

from mssr.rewards.mathematics.normalise import clean, squeeze, words
from mssr.rewards.mathematics.numbers import Number, close, parse_number
from mssr.rewards.mathematics.options import Option, names_another, parse_option
from mssr.rewards.mathematics.structure import (
    Parts,
    Relation,
    as_interval,
    grouped,
    increasing,
    is_name,
    matrices,
    name_and_values,
    names_of,
    plain,
    pointed,
    related,
    split_lists,
    wordy,
)
from mssr.rewards.mathematics.units import DEGREE, RADIAN, Quantity, Unit, parse_quantity
from mssr.rewards.mathematics.vocabulary import combinations, is_constant, is_mathematics, is_product

Library = Callable[[str, str, str], bool]  # (kind, predicted, gold); the kinds are those of symbolic.py

_EXPLAINED = re.compile(r"(?!no\. ?\d)(yes|no)[,;:.] (?!.*\b(?:yes|no|maybe|but)\b).*", re.IGNORECASE)  # not No. 5
_QUOTIENT = re.compile(r"^\\frac\{([^{}]+)\}\{([^{}]+)\}$")
_TO = re.compile(r" ?\bto\b ?|:")
_TIME = re.compile(r"\d{1,2}(?::\d{2})+", re.ASCII)
_SYMMETRIC = {"\\neq", "\\parallel", "\\perp", "\\cong", "\\sim"}
_LINE = re.compile(r"(?:line |\\(?:overline|overleftrightarrow|overrightarrow)\{)?([A-Z]{2})\}?")
_UNORDERED = re.compile(r"(\\angle ?|\\overline\{|\\overleftrightarrow\{|line )([A-Z])([A-Z]?)([A-Z])(\}?)")
_SPELLED = "first second third fourth fifth sixth seventh eighth ninth tenth"
_ENDINGS = {1: "st", 2: "nd", 3: "rd"}
_ORDINALS = {word: f"{place}{_ENDINGS.get(place, 'th')}" for place, word in enumerate(_SPELLED.split(), 1)}
_ROOT = re.compile(r"^x(?:_\{\d\})?=")
_BARE = Unit(Fraction(1), Fraction(1), ())
MAX_DEPTH = 4  # of lists in lists


def same_answer(predicted: str, gold: str, library: Library) -> bool:
    """Whether the predicted answer says what the right one says."""
    predicted, gold = clean(predicted), clean(gold)
    if not predicted or not gold:
        return False
    if predicted == gold:
        return True
    if re.fullmatch("[A-D]", gold) and predicted == gold.lower():  # the choices of a question, more likely than symbols
        return True
    if _explains(predicted, gold) or _explains(gold, predicted):
        return True
    ours, right = parse_option(predicted), parse_option(gold)
    if ours and right:
        return _same_option(ours, right, library)
    if ours or right:  # A. 12 cm and 12 cm
        texts = (ours.text, gold) if ours else (predicted, right.text)
        if None in texts or parse_option((ours or right).text):  # (A) B. 12 names two options
            return False
        return same_answer(*texts, library)
    predicted, gold = squeeze(predicted), squeeze(gold)
    if _may_be_point(predicted) and related(gold).operators:
        return False
    return _Comparison(library).same(predicted, gold, MAX_DEPTH)


def _explains(text: str, decision: str) -> bool:
    """Whether the text is the decision, yes or no, with an explanation."""
    found = _EXPLAINED.fullmatch(text)
    return found is not None and found[1].lower() == words(decision)


def _may_be_point(text: str) -> bool:
    """Whether an open interval may be a point, as (1,2) may."""
    group = grouped(text) if text else None
    return group is not None and group.brackets == "()" and "\\infty" not in text


def _same_option(ours: Option, right: Option, library: Library) -> bool:
    texts = [option.text for option in (ours, right) if option.text is not None]
    if len(texts) == 2 and not same_answer(*texts, library):
        return False
    if ours.letters == right.letters:
        return not any(map(names_another, texts))
    return sorted(ours.letters) == sorted(right.letters) and not (ours.ordered and right.ordered)


class _Comparison:
    """Tries, in this order: quantities, lists, relations, tuples and intervals, mathematics, words."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self.same = cache(self._same)

    def _same(self, predicted: str, gold: str, depth: int) -> bool:
        if predicted == gold:
            return True
        if depth == 0 or not predicted or not gold:
            return False
        ours, right = parse_quantity(predicted, False), parse_quantity(gold, True)
        if ours and right:
            return self._quantities(ours, right)
        (point, predicted), (right_point, gold) = map(pointed, matrices(plain(predicted), plain(gold)))
        if point != right_point and point and right_point:
            return False
        parts, right_parts = split_lists(predicted, gold)
        if len(parts.items) > 1 or len(right_parts.items) > 1:
            return not (ours or right) and self._lists(parts, right_parts, depth - 1)
        sides, right_sides = related(predicted), related(gold)
        if sides.operators or right_sides.operators:
            return self._relations(sides, right_sides, depth - 1)
        group, right_group = grouped(predicted), grouped(gold)
        if group and right_group:
            alike = group.brackets == right_group.brackets or {group.brackets, right_group.brackets} == {"()", "⟨⟩"}
            return alike and self._lists(group.parts, right_group.parts, depth - 1)
        return self._values(predicted, gold)

    def _values(self, predicted: str, gold: str) -> bool:
        products = [is_product(text) for text in (predicted, gold)]
        if not all(products) and all(
            product or is_mathematics(text) for product, text in zip(products, (predicted, gold))
        ):
            return self._library("value", predicted, gold)
        if _key(predicted) == _key(gold) or (":" in predicted + gold and self._ratios(predicted, gold)):
            return True
        named = combinations(predicted, gold)
        return named is not None and all(map(is_mathematics, named)) and self._library("value", *named)

    def _ratios(self, predicted: str, gold: str) -> bool:
        """Compare 3:5 with 3 to 5 and \\frac{3}{5}, 2:4 with 1:2. 1:20 may be a time, which equals only 1 to 20."""
        timed = _TIME.fullmatch(predicted) or _TIME.fullmatch(gold)
        if not timed:
            predicted, gold = (_QUOTIENT.sub(r"\1:\2", text) for text in (predicted, gold))
        ours, right = _TO.split(predicted), _TO.split(gold)
        if len(ours) != len(right) or not all(map(is_constant, ours + right)):
            return False
        if ours == right:
            return True
        if timed or "0" in ours + right:
            return False
        products = [(f"({one})\\cdot({right[0]})", f"({other})\\cdot({ours[0]})") for one, other in zip(ours, right)]
        return all(self._library("value", *pair) for pair in products[1:])

    def _quantities(self, ours: Quantity, right: Quantity) -> bool:
        """Compare values with the same unit or one that converts, or with a unit on one side only."""
        one, other = ours.unit or _BARE, right.unit or _BARE
        if one.dimensions == other.dimensions:
            return self._scaled(ours.head, one.scale * one.factor, right.head, other.scale * other.factor)
        if one.dimensions and other.dimensions:
            angles = [
                f"\\frac{{180}}{{\\pi}}({each.head})" if unit == RADIAN else each.head
                for each, unit in ((ours, one), (right, other))
            ]
            return {one, other} == {DEGREE, RADIAN} and self._values(*angles)
        percents = [Fraction(1, 100) if unit.dimensions == (("%", 1),) else Fraction(1) for unit in (one, other)]
        return self._scaled(ours.head, one.scale, right.head, other.scale) or (
            percents[0] != percents[1] and self._scaled(ours.head, percents[0], right.head, percents[1])
        )

    def _scaled(self, predicted: str, factor: Fraction, gold: str, right_factor: Fraction) -> bool:
        ours, right = parse_number(predicted), parse_number(gold)
        ratio = factor / right_factor
        if ours and right:
            return close(Number(ours.value * ratio, ours.digits, ours.places), right)
        if ratio != 1:
            predicted = f"\\frac{{{ratio.numerator}}}{{{ratio.denominator}}}\\cdot({predicted})"
        return self._values(predicted, gold)

    def _lists(self, parts: Parts, right: Parts, depth: int) -> bool:
        ours, theirs = parts.items, right.items
        if len(ours) != len(theirs):
            return False
        joined = {parts.joined, right.joined}
        ordered = parts.ordered or right.ordered
        if "mixed" in joined or (ordered and "or" in joined):
            return False
        differ = {"and", "or"} <= joined or (joined == {",", "or"} and wordy(ours + theirs))
        if differ and _states(ours + theirs):
            return False
        names, right_names = names_of(ours), names_of(theirs)
        if _are_roots(names | right_names):
            ours, theirs = ([_ROOT.sub("", item) for item in items] for items in (ours, theirs))
            names, right_names = names_of(ours), names_of(theirs)
        if all(self.same(one, other, depth) for one, other in zip(ours, theirs)):
            return True
        if ordered or (names != right_names and len(names | right_names) > 1):
            return False
        return self._in_any_order(ours, theirs, depth)

    def _in_any_order(self, ours: list[str], theirs: list[str], depth: int) -> bool:
        left = list(theirs)
        for one in ours:
            found = next((place for place, other in enumerate(left) if self.same(one, other, depth)), None)
            if found is None:
                return False
            del left[found]
        return True

    def _relations(self, ours: Relation, right: Relation, depth: int) -> bool:
        if "" in (ours.sides[-1], right.sides[-1]):  # unfinished: 8=
            return False
        ours, right = increasing(ours), increasing(right)
        if "\\in" in ours.operators or "\\in" in right.operators:
            return self._members(ours, right, depth)
        if all(set(each.operators) <= {"=", "\\approx"} for each in (ours, right)):
            return self._equations(ours, right, depth)
        interval, right_interval = as_interval(ours), as_interval(right)
        if interval and right_interval:
            if interval.name and right_interval.name and interval.name != right_interval.name:
                return False
            return interval.brackets == right_interval.brackets and self._sides(
                interval.ends, right_interval.ends, depth
            )
        if ours.operators != right.operators:
            return False
        if not set(ours.operators) <= _SYMMETRIC:
            return self._sides(ours.sides, right.sides, depth)
        sides, right_sides = (
            [_LINE.sub(r"\\overline{\1}", side) if _LINE.fullmatch(side) else side for side in each.sides]
            for each in (ours, right)
        )
        return self._sides(sides, right_sides, depth) or self._sides(sides, right_sides[::-1], depth)

    def _sides(self, ours: Sequence[str], right: Sequence[str], depth: int) -> bool:
        """Compare side by side; a name may be missing at the start: \\neq 5 and x \\neq 5."""
        unnamed = "" in (ours[0], right[0]) and is_name(ours[0] + right[0])
        return all(self.same(one, other, depth) for one, other in list(zip(ours, right))[unnamed:])

    def _members(self, ours: Relation, right: Relation, depth: int) -> bool:
        names = {_name_of_values(each) for each in (ours, right) if each.operators}
        if len(names) != 1:
            return False
        one, other = (each.sides[-1] if each.operators == ("\\in",) else each.text for each in (ours, right))
        return self.same(one, other, depth)

    def _equations(self, ours: Relation, right: Relation, depth: int) -> bool:
        if sorted(map(_key, ours.sides)) == sorted(map(_key, right.sides)):
            return True
        (name, values), (right_name, right_values) = name_and_values(ours), name_and_values(right)
        if ours.operators and right.operators and (not name or _key(name) != _key(right_name)):
            return self._as_equations(ours, right)
        if wordy([side for group in (*values, *right_values) for side in group]):
            return False  # right = left
        found = any(
            all(self.same(one, other, depth) for one in group for other in right_group)
            for group in values
            for right_group in right_values
        )
        return found and self._consistent(values)

    def _consistent(self, values: list[list[str]]) -> bool:
        """Whether the value after an approximate sign, of which there may be one, is the rounded value before it."""
        if len(values) < 2:
            return True
        exact, rounded = values[0][0], values[1][0].replace(",", "")
        return len(values) == 2 and is_constant(exact) and self._library("rounded", exact, rounded)

    def _as_equations(self, ours: Relation, right: Relation) -> bool:
        if not ours.operators == right.operators == ("=",):
            return False
        if not all(is_mathematics(side) for side in (*ours.sides, *right.sides)):
            return False
        return self._library("equation", "=".join(ours.sides), "=".join(right.sides))


def _name_of_values(relation: Relation) -> str:
    """Return x for x \\in (1,2), 1<x<2 and x=1."""
    if relation.operators == ("\\in",):
        return relation.sides[0]
    interval = as_interval(relation)
    return interval.name if interval else name_and_values(relation)[0]


def _states(items: list[str]) -> bool:
    """Whether the items are statements, which "and" and "or" tell apart: not values, or values of one variable."""
    operators = {operator for item in items for operator in related(item).operators}
    return not operators <= {"=", "\\approx"} or len(names_of(items)) > 1 or any(map(is_name, items))


def _are_roots(names: set[str]) -> bool:
    """Whether the names are x_{1}, x_{2} and so on, or x: solutions of one equation, which have no order."""
    return all(_ROOT.fullmatch(name + "=") for name in names)


def _key(text: str) -> str:
    r"""What words share. \angle CBA is \angle ABC, and \overline{BA} is \overline{AB}."""
    text = words(text).replace(";", ",")
    text = re.sub(r"(?<=\d) ?to ?(?=\d)", "-", _ORDINALS.get(text.lower(), text))
    found = _UNORDERED.fullmatch(text)
    return f"{found[1]}{min(found[2], found[4])}{found[3]}{max(found[2], found[4])}{found[5]}" if found else text
