"""Decides whether two answers say the same: options, quantities, lists, equations, intervals, words, mathematics.

Both are normalised first. Structure is compared here, part by part; only a part that is mathematics, and nothing else,
reaches the library. Where a reading is ambiguous, answers are different: a reward for a wrong answer is worse than none.

- A unit may be missing on one side (`30°` and `30`); two units must be the same, or convert (`5 m` and `500 cm`).
- `x=5` equals `5`, but not `y=5`. `\\leq 5` and `\\neq 5` equal only their kind.
- Bare lists and sets have no order (`1, 2` and `2, 1`); tuples and intervals have one, and their brackets count.
- "and" and "or" are the same between values (`1 and 2` and `1 or 2`), not between conditions and words.
- `x_{1}=2, x_{2}=3` are solutions: they have no order, and may be called x. Other names with indices stay apart.
- A value after ≈ counts if it is the rounded value before it (`4\\pi\\approx 12.57`).
- An option letter counts with its text, unless the text takes it back or names another option (`A. not B`).
- `1<x<2` equals `(1,2)`, but a predicted `(1,2)` may be a point.
- Letters side by side are a word (`left` is not `felt`, `AB` is not `BA`), unless operators or digits are beside them.
- Case is ignored in words of three letters or more, not in symbols, formulas and names of points.
"""

import re
from collections.abc import Callable
from fractions import Fraction
from itertools import permutations
from typing import NamedTuple

from mssr.rewards.normalise import clean, squeeze, words
from mssr.rewards.numbers import Number, close, parse_number
from mssr.rewards.structure import (
    Group,
    Parts,
    Relation,
    as_interval,
    both_signs,
    grouped,
    increasing,
    is_name,
    name_and_values,
    names_of,
    related,
    split_lists,
    without_brackets,
    without_builder,
)
from mssr.rewards.units import Quantity, Unit, parse_quantity
from mssr.rewards.vocabulary import is_constant, is_mathematics, is_product

Library = Callable[[str, str, str], bool]  # (kind, predicted, gold); the kinds are those of worker.py

_OPTION = re.compile(r"[(\[]?([A-J])[)\]]?[.:,)]?|\(([a-j])\)|([a-j])[.)]")
_OPTION_TEXT = re.compile(
    r"(?:\(([A-J])\)|([A-J])(?:[.:)](?!\S?$)|,(?=[^\sA-J(])))\s*([^\s^_+*/=\\].*|\\[a-z].*|[-+]?\s*\d.*)", re.DOTALL
)
# What takes an option back or adds a second one: B. 6; not B; or B; B alone.
_OTHER_OPTION = re.compile(
    r"(?<![A-Za-z(])[A-J](?:[.:)]\s+\S|[.:),]\d)|(?<![A-Za-z])\([A-J]\)|^[A-J]$"
    r"|\b(?i:is|or|not|answer|option|choice|choose|but)\s+\(?[A-J]\)?(?![\w'])"
    r"|\b[nN]ot (?:correct|right|true)\b|\b(?:incorrect|wrong)\b"
)
_OPTION_WORD = re.compile(r"(?:(?:the )?(?:option|choice)\s*:?|选项?|故选:?)\s*", re.IGNORECASE)
_LETTERS = re.compile(r"[(\[]?[A-H][)\]]?(?:(?:\s*(?:,|;|&|and|和|与)\s*|\s*)[(\[]?[A-H][)\]]?)+")
_RATIO = re.compile(r"([1-9]\d{0,8}):([1-9]|[1-9]\d{2,8})", re.ASCII)  # 1:20 may be a time
_SPELLED = "first second third fourth fifth sixth seventh eighth ninth tenth"
_ENDINGS = {1: "st", 2: "nd", 3: "rd"}
_ORDINALS = {word: f"{place}{_ENDINGS.get(place, 'th')}" for place, word in enumerate(_SPELLED.split(), 1)}
_ROOT = re.compile(r"^x(?:_\{\d\})?=")
_POINT = re.compile(r"([A-Z])'?(?=\()")
MAX_PARTS = 12  # of a list without order, compared in every order
MAX_DEPTH = 4  # of lists in lists


def same_answer(predicted: str, gold: str, library: Library) -> bool:
    """Whether the predicted answer says what the right one says."""
    predicted, gold = clean(predicted), clean(gold)
    if not predicted or not gold:
        return False
    chosen = _by_option(predicted, gold, library)
    if chosen is not None:
        return chosen
    predicted, gold = squeeze(predicted), squeeze(gold)
    if _may_be_point(predicted) and related(gold).operators:
        return False
    return _Comparison(library).same(predicted, gold, MAX_DEPTH)


def _may_be_point(text: str) -> bool:
    """Whether an open interval may be a point, as (1,2) may."""
    group = grouped(text) if text else None
    return group is not None and group.brackets == "()" and len(group.parts.items) == 2 and "\\infty" not in text


class _Option(NamedTuple):
    letters: str
    text: str | None


def _option(text: str) -> _Option | None:
    without = _OPTION_WORD.sub("", text, count=1) if _OPTION_WORD.match(text) else text
    if found := _OPTION.fullmatch(without.strip()):
        return _Option((found[1] or found[2] or found[3]).upper(), None)
    if found := _OPTION_TEXT.fullmatch(without):
        return _Option(found[1] or found[2], found[3])
    if _LETTERS.fullmatch(without) and not re.fullmatch(r"\([A-H]+\)|[\[(][A-H],\s*[A-H][)\]]", without):
        letters = re.findall("[A-H](?![a-z])", without)
        spaced = without != "".join(letters)
        if len(set(letters)) == len(letters):
            return _Option("".join(sorted(letters) if spaced else letters), None)
    return None


def _by_option(predicted: str, gold: str, library: Library) -> bool | None:
    """Compare option letters and texts; None if neither answer is an option."""
    if predicted == gold:
        return True
    ours, right = _option(predicted), _option(gold)
    if ours is None and right is None:
        return None
    if ours is not None and right is not None:
        if ours.text is not None and right.text is not None and not same_answer(ours.text, right.text, library):
            return False
        if ours.letters == right.letters:
            return not any(text is not None and _OTHER_OPTION.search(text) for text in (ours.text, right.text))
        return (
            len(ours.letters) > 1
            and sorted(ours.letters) == sorted(right.letters)
            and (not predicted.isalpha() or not gold.isalpha())
        )
    if ours is not None:
        return ours.text is not None and same_answer(ours.text, gold, library)
    return right.text is not None and same_answer(predicted, right.text, library)


class _Comparison:
    def __init__(self, library: Library) -> None:
        self._library = library
        self._known: dict[tuple[str, str, int], bool] = {}

    def same(self, predicted: str, gold: str, depth: int) -> bool:
        key = (predicted, gold, depth)
        if key not in self._known:
            self._known[key] = self._same(predicted, gold, depth)
        return self._known[key]

    def _same(self, predicted: str, gold: str, depth: int) -> bool:
        if predicted == gold:
            return True
        if depth == 0 or not predicted or not gold:
            return False
        ours, right = parse_quantity(predicted, False), parse_quantity(gold, True)
        if ours and right:
            return self._quantities(ours, right)
        predicted, gold = (without_brackets(without_builder(text)) for text in (predicted, gold))
        if predicted == gold:
            return True
        if "\\pm" in predicted or "\\pm" in gold:
            predicted, gold = both_signs(predicted), both_signs(gold)
        parts, right_parts = split_lists(predicted, gold)
        if len(parts.items) > 1 or len(right_parts.items) > 1:
            return self._lists(parts, right_parts, depth - 1)
        sides, right_sides = related(predicted), related(gold)
        if sides.operators or right_sides.operators:
            return self._relations(sides, right_sides, depth - 1)
        point, right_point = _POINT.match(predicted), _POINT.match(gold)
        if point and right_point:
            inner, right_inner = predicted[point.end() :], gold[right_point.end() :]
            return point[0] == right_point[0] and self.same(inner, right_inner, depth - 1)
        group, right_group = grouped(predicted), grouped(gold)
        if group and right_group:
            return group.brackets == right_group.brackets and self._lists(group.parts, right_group.parts, depth - 1)
        if group or right_group:
            return self._group_and_plain(group, right_group, predicted, gold, depth - 1)
        return self._values(predicted, gold)

    def _values(self, predicted: str, gold: str) -> bool:
        products = [is_product(text) for text in (predicted, gold)]
        if not all(products) and all(
            product or is_mathematics(text) for product, text in zip(products, (predicted, gold))
        ):
            return self._library("value", predicted, gold)
        ratios = [_RATIO.fullmatch(text) for text in (predicted, gold)]
        if all(ratios):
            return Fraction(int(ratios[0][1]), int(ratios[0][2])) == Fraction(int(ratios[1][1]), int(ratios[1][2]))
        return _key(predicted) == _key(gold)

    def _quantities(self, ours: Quantity, right: Quantity) -> bool:
        one, other = ours.unit, right.unit
        if one is None and other is None:
            return self._scaled(ours.head, Fraction(1), right.head, Fraction(1))
        if one is not None and other is not None:
            if one.dimensions != other.dimensions and (_bare_scale(one) or _bare_scale(other)):  # 5 million, $5 million
                return self._scaled(ours.head, one.scale, right.head, other.scale)
            if one.dimensions != other.dimensions:
                return False
            return self._scaled(ours.head, one.scale * one.factor, right.head, other.scale * other.factor)
        if (one or other).dimensions == (("%", 1),):
            percent = Fraction(1, 100)
            if self._scaled(ours.head, percent if one else Fraction(1), right.head, percent if other else Fraction(1)):
                return True
        return self._scaled(
            ours.head, one.scale if one else Fraction(1), right.head, other.scale if other else Fraction(1)
        )

    def _scaled(self, predicted: str, factor: Fraction, gold: str, right_factor: Fraction) -> bool:
        ours, right = parse_number(predicted), parse_number(gold)
        ratio = factor / right_factor
        if ours and right:
            return close(Number(ours.value * ratio, ours.digits, ours.places), right)
        predicted, gold = (
            f"\\frac{{{number.value.numerator}}}{{{number.value.denominator}}}" if number and " " in text else text
            for number, text in ((ours, predicted), (right, gold))
        )
        if ratio != 1:
            predicted = f"\\frac{{{ratio.numerator}}}{{{ratio.denominator}}}\\cdot({predicted})"
        return self._values(predicted, gold)

    def _lists(self, parts: Parts, right: Parts, depth: int) -> bool:
        ours, theirs = parts.items, right.items
        if len(ours) != len(theirs):
            return False
        joined = {parts.joined, right.joined}
        differ = {"and", "or"} <= joined or (joined == {",", "or"} and _wordy(ours + theirs))
        if ("mixed" in joined or differ) and (_states(ours) or _states(theirs)):
            return joined == {"mixed"} and ours == theirs
        names, right_names = names_of(ours), names_of(theirs)
        if _are_roots(names | right_names):
            ours, theirs = ([_ROOT.sub("", item) for item in items] for items in (ours, theirs))
            names, right_names = names_of(ours), names_of(theirs)
        if all(self.same(one, other, depth) for one, other in zip(ours, theirs)):
            return True
        if parts.ordered or right.ordered or len(ours) > MAX_PARTS or "mixed" in joined:
            return False
        if max(len(names), len(right_names)) > 1 and names != right_names:
            return False
        return self._in_any_order(ours, theirs, depth)

    def _in_any_order(self, ours: list[str], theirs: list[str], depth: int) -> bool:
        if len(ours) <= 3:
            return any(all(self.same(*pair, depth) for pair in zip(ours, order)) for order in permutations(theirs))
        left = list(theirs)
        for one in ours:
            found = next((place for place, other in enumerate(left) if self.same(one, other, depth)), None)
            if found is None:
                return False
            del left[found]
        return True

    def _group_and_plain(self, group: Group | None, right: Group | None, predicted: str, gold: str, depth: int) -> bool:
        """Compare (1,2) with A(1,2), and a list that is one value in brackets with the value."""
        one, plain = (group, gold) if group else (right, predicted)
        if len(one.parts.items) == 1 and one.brackets in ("()", "⦃⦄") and one.parts.items != ["\\emptyset"]:
            return self.same(one.parts.items[0], plain, depth) if group else self.same(plain, one.parts.items[0], depth)
        if found := _POINT.match(plain):
            inner = plain[found.end() :]
            return self.same(predicted, inner, depth) if group else self.same(inner, gold, depth)
        return words(predicted) == words(gold)

    def _relations(self, ours: Relation, right: Relation, depth: int) -> bool:
        if not ours.sides[-1] or not right.sides[-1]:  # unfinished: 8=
            return False
        ours, right = increasing(ours), increasing(right)
        if "\\in" in ours.operators or "\\in" in right.operators:
            return self._members(ours, right, depth)
        equations = [set(each.operators) <= {"=", "\\approx"} for each in (ours, right)]
        if all(equations):
            return self._equations(ours, right, depth)
        interval, right_interval = as_interval(ours), as_interval(right)
        if interval and right_interval:
            if interval.name and right_interval.name and interval.name != right_interval.name:
                return False
            return interval.brackets == right_interval.brackets and all(
                self.same(one, other, depth) for one, other in zip(interval.ends, right_interval.ends)
            )
        if ours.operators != right.operators:
            return False
        start, *others = zip(ours.sides, right.sides)
        same_start = start[0] == start[1] or ("" in start and is_name("".join(start))) or self.same(*start, depth)
        return same_start and all(one == other or self.same(one, other, depth) for one, other in others)

    def _members(self, ours: Relation, right: Relation, depth: int) -> bool:
        names = {each.sides[0] for each in (ours, right) if each.operators == ("\\in",)}
        if len(names) != 1 or any("\\in" in each.operators[1:] for each in (ours, right)):
            return False
        one, other = (each.sides[-1] if each.operators == ("\\in",) else each.text for each in (ours, right))
        return self.same(one, other, depth)

    def _equations(self, ours: Relation, right: Relation, depth: int) -> bool:
        if len(ours.sides) == len(right.sides) == 2 and sorted(map(_key, ours.sides)) == sorted(map(_key, right.sides)):
            return True
        (name, values), (right_name, right_values) = name_and_values(ours), name_and_values(right)
        if ours.operators and right.operators:
            if not name and not right_name:
                sides = len(ours.sides) == len(right.sides) and zip(ours.sides, right.sides)
                if sides and all(self.same(one, other, depth) for one, other in sides):
                    return True
            if not name or not right_name or _key(name) != _key(right_name):
                return self._as_equations(ours, right)
        if _wordy([side for group in (*values, *right_values) for side in group]):
            return False  # right = left
        found = any(
            all(self.same(one, other, depth) for one in group for other in right_group)
            for group in values
            for right_group in right_values
        )
        return found and self._consistent(values) and self._consistent(right_values)

    def _consistent(self, values: list[list[str]]) -> bool:
        """Whether the value after an approximate sign, of which there may be one, is the rounded value before it."""
        if len(values) < 2:
            return True
        exact, rounded = values[0][0], values[1][0].replace(",", "")
        if len(values) > 2 or not is_constant(exact) or not re.fullmatch(r"-?\d+(?:\.\d+)?", rounded):
            return False
        return self._library("rounded", exact, rounded)

    def _as_equations(self, ours: Relation, right: Relation) -> bool:
        if ours.operators != ("=",) or right.operators != ("=",):
            return False
        if not all(is_mathematics(side) for side in (*ours.sides, *right.sides)):
            return False
        return self._library("equation", "=".join(ours.sides), "=".join(right.sides))


def _bare_scale(unit: Unit) -> bool:
    return not unit.dimensions and unit.scale != 1


def _states(items: list[str]) -> bool:
    """Whether the items are statements, which "and" and "or" tell apart: not values, or values of one variable."""
    relations = [related(item) for item in items]
    if any(set(relation.operators) - {"=", "\\approx"} for relation in relations) or len(names_of(items)) > 1:
        return True
    return _wordy(items) or all(is_name(item) for item in items)


def _are_roots(names: set[str]) -> bool:
    """Whether the names are x_{1}, x_{2} and so on, or x: solutions of one equation, which have no order."""
    return any(name != "x" for name in names) and all(_ROOT.fullmatch(name + "=") for name in names)


def _wordy(items: list[str]) -> bool:
    return any(re.search(r"(?<![\\A-Za-z])[A-Za-z]{3}", item) and not is_mathematics(item) for item in items)


def _key(text: str) -> str:
    r"""What words share. \angle CBA is \angle ABC: the vertex is in the middle."""
    text = words(text).replace(";", ",")
    text = _ORDINALS.get(text.lower(), text)
    found = re.fullmatch(r"\\angle ?([A-Z])([A-Z])([A-Z])", text)
    return f"\\angle {min(found[1], found[3])}{found[2]}{max(found[1], found[3])}" if found else text
