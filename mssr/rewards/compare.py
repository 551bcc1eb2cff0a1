"""Decides whether two answers say the same: options, quantities, lists, equations, intervals, words, mathematics.

Both are normalised first. Structure is compared here, part by part; only a part that is mathematics, and nothing else,
reaches the library. Where a reading is ambiguous, answers are different: a reward for a wrong answer is worse than none.

- A unit may be missing on one side (`30°` and `30`); two units must be the same, or convert (`5 m` and `500 cm`).
- `x=5` equals `5`, but not `y=5`. `\\leq 5` and `\\neq 5` equal only their kind.
- Bare lists and sets have no order (`1, 2` and `2, 1`); tuples and intervals have one, and their brackets count.
- Letters side by side are a word (`left` is not `felt`, `AB` is not `BA`), unless operators or digits are beside them.
- Case is ignored in words of three letters or more, not in symbols, formulas and names of points.
"""

import re
from collections.abc import Callable
from fractions import Fraction
from itertools import permutations
from typing import NamedTuple

from mssr.rewards.normalise import CLOSE, OPEN, clean, closing, squeeze, words
from mssr.rewards.numbers import Number, close, parse_number
from mssr.rewards.units import Unit, parse_unit
from mssr.rewards.vocabulary import is_constant, is_mathematics, is_product

Library = Callable[[str, str, str], bool]  # (kind: "value" or "equation", predicted, gold)

_OPTION = re.compile(r"[(\[]?([A-J])[)\]]?[.:,)]?|\(([a-j])\)|([a-j])[.)]")
_OPTION_TEXT = re.compile(r"(?:\(([A-J])\)|([A-J])(?:[.:)](?!\S?$)|,(?=[^\sA-J(])))\s*([^\s^_+*/=\\].*|\\[a-z].*|[-+]?\s*\d.*)", re.DOTALL)
_OPTION_WORD = re.compile(r"(?:(?:the )?(?:option|choice)\s*:?|选项?|故选:?)\s*", re.IGNORECASE)
_LETTERS = re.compile(r"[(\[]?[A-H][)\]]?(?:(?:\s*(?:,|;|&|and|和|与)\s*|\s*)[(\[]?[A-H][)\]]?)+")
_RELATION = re.compile(r"\\(?:leq|geq|neq|approx|in)(?![a-zA-Z])|[<>=]")
_SEPARATOR = re.compile(r"[,;]|\b(?:and|or)\b|[和或及与]|\\(?:cup|lor|vee|land|wedge)(?![a-zA-Z])")
_NAME = re.compile(
    r"(?:m?\\(?:angle|triangle|overline|overrightarrow|vec|sin|cos|tan) ?)?\{?(?:[A-Za-z]{1,4}|\\(?:alpha|beta|gamma|delta|theta|lambda|mu|rho|sigma|phi|omega|Delta)|[a-zA-Z]{2,}(?: [a-zA-Z]+){0,4}"
    r"|[\u4e00-\u9fff]{1,8})\}?'?(?:_\{\\?[A-Za-z0-9 ]+\})?'?(?:\([a-z]\))?"
)
_POINT = re.compile(r"([A-Z])'?(?=\()")
_CURRENCY = re.compile(r"([+-]?)(US\$|[$¥€£₹])(?=[\d.])")
_DEGREES = re.compile(r"(\d+)°(\d+)'(?:(\d+(?:\.\d+)?)'')?")
_MIRRORED = {"<": ">", ">": "<", "\\leq": "\\geq", "\\geq": "\\leq", "=": "=", "\\neq": "\\neq", "\\approx": "\\approx"}
MAX_PARTS = 12  # of a list without order, compared in every order
MAX_DEPTH = 4  # of lists in lists


def same_answer(predicted: str, gold: str, library: Library) -> bool:
    """Whether the predicted answer says what the right one says."""
    predicted, gold = clean(predicted), clean(gold)
    if not predicted or not gold:
        return False
    chosen = _by_option(predicted, gold, library)
    return _Comparison(library).same(squeeze(predicted), squeeze(gold), MAX_DEPTH) if chosen is None else chosen


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
    ours, right = _option(predicted), _option(gold)
    if ours is None and right is None:
        return None
    if ours is not None and right is not None:
        if ours.text is not None and right.text is not None and not same_answer(ours.text, right.text, library):
            return False
        if ours.letters == right.letters:
            return True
        return len(ours.letters) > 1 and sorted(ours.letters) == sorted(right.letters) and (
            not predicted.isalpha() or not gold.isalpha()
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
        ours, right = _quantity(predicted, False), _quantity(gold, True)
        if ours and right:
            return self._quantities(ours, right)
        predicted, gold = _bare(predicted), _bare(gold)
        if predicted == gold:
            return True
        if "\\pm" in predicted or "\\pm" in gold:
            predicted, gold = _both_signs(predicted), _both_signs(gold)
        parts, right_parts = _listed(predicted, gold)
        if len(parts.items) > 1 or len(right_parts.items) > 1:
            return self._lists(parts, right_parts, depth - 1)
        sides, right_sides = _relation(predicted), _relation(gold)
        if sides.operators or right_sides.operators:
            return self._relations(sides, right_sides, depth - 1)
        group, right_group = _group(predicted), _group(gold)
        if group and right_group:
            return group.brackets == right_group.brackets and self._lists(group.parts, right_group.parts, depth - 1)
        if group or right_group:
            return self._group_and_plain(group, right_group, predicted, gold, depth - 1)
        return self._values(predicted, gold)

    def _values(self, predicted: str, gold: str) -> bool:
        if (is_mathematics(predicted) or is_product(predicted)) and (is_mathematics(gold) or is_product(gold)):
            if not (is_product(predicted) and is_product(gold)):
                return self._library("value", predicted, gold)
        return _key(predicted) == _key(gold)

    def _quantities(self, ours: "_Quantity", right: "_Quantity") -> bool:
        one, other = ours.unit, right.unit
        if one is None and other is None:
            return self._scaled(ours.head, Fraction(1), right.head, Fraction(1))
        if one is not None and other is not None:
            if one.dimensions != other.dimensions:
                return False
            return self._scaled(ours.head, one.scale * one.factor, right.head, other.scale * other.factor)
        if (one or other).dimensions == (("%", 1),):
            percent = Fraction(1, 100)
            if self._scaled(ours.head, percent if one else Fraction(1), right.head, percent if other else Fraction(1)):
                return True
        return self._scaled(ours.head, one.scale if one else Fraction(1), right.head, other.scale if other else Fraction(1))

    def _scaled(self, predicted: str, factor: Fraction, gold: str, right_factor: Fraction) -> bool:
        ours, right = parse_number(predicted), parse_number(gold)
        ratio = factor / right_factor
        if ours and right:
            return close(Number(ours.value * ratio, ours.digits, ours.places), right) if ratio == 1 else (
                ours.value * ratio == right.value or close(_rescaled(ours, ratio), right)
            )
        if ratio != 1:
            predicted = f"\\frac{{{ratio.numerator}}}{{{ratio.denominator}}}\\cdot({predicted})"
        return self._values(predicted, gold)

    def _lists(self, parts: "_Parts", right: "_Parts", depth: int) -> bool:
        ours, theirs = parts.items, right.items
        if len(ours) != len(theirs):
            return False
        if all(self.same(one, other, depth) for one, other in zip(ours, theirs)):
            return parts.joined == right.joined or not _wordy(ours + theirs)
        if parts.ordered or right.ordered or len(ours) > MAX_PARTS or (_wordy(ours + theirs) and parts.joined != right.joined):
            return False
        if len(_names(ours)) > 1 or len(_names(theirs)) > 1:
            if _names(ours) != _names(theirs):
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

    def _group_and_plain(
        self, group: "_Group | None", right: "_Group | None", predicted: str, gold: str, depth: int
    ) -> bool:
        """Compare (1,2) with A(1,2), and a list that is one value in brackets with the value."""
        one, plain = (group, gold) if group else (right, predicted)
        if len(one.parts.items) == 1 and one.brackets in ("()", "⦃⦄") and one.parts.items != ["\\emptyset"]:
            return self.same(one.parts.items[0], plain, depth) if group else self.same(plain, one.parts.items[0], depth)
        if found := _POINT.match(plain):
            inner = plain[found.end() :]
            return self.same(predicted, inner, depth) if group else self.same(inner, gold, depth)
        return words(predicted) == words(gold)

    def _relations(self, ours: "_Relation", right: "_Relation", depth: int) -> bool:
        if not any(ours.sides) or not any(right.sides):
            return False
        ours, right = _increasing(ours), _increasing(right)
        if "\\in" in ours.operators or "\\in" in right.operators:
            return self._members(ours, right, depth)
        equations = [set(each.operators) <= {"=", "\\approx"} for each in (ours, right)]
        if all(equations):
            return self._equations(ours, right, depth)
        interval, right_interval = _interval(ours), _interval(right)
        if interval and right_interval:
            if interval.name and right_interval.name and interval.name != right_interval.name:
                return False
            return interval.brackets == right_interval.brackets and all(
                self.same(one, other, depth) for one, other in zip(interval.ends, right_interval.ends)
            )
        if ours.operators != right.operators:
            return False
        return all(
            one == other or (one == "" or other == "") and _is_name(one + other) and place == 0 or self.same(one, other, depth)
            for place, (one, other) in enumerate(zip(ours.sides, right.sides))
        )

    def _members(self, ours: "_Relation", right: "_Relation", depth: int) -> bool:
        names = {each.sides[0] for each in (ours, right) if each.operators == ("\\in",)}
        if len(names) != 1 or any("\\in" in each.operators[1:] for each in (ours, right)):
            return False
        one, other = (each.sides[-1] if each.operators == ("\\in",) else each.text for each in (ours, right))
        return self.same(one, other, depth)

    def _equations(self, ours: "_Relation", right: "_Relation", depth: int) -> bool:
        (name, values), (right_name, right_values) = _named(ours), _named(right)
        if name and right_name and _key(name) != _key(right_name) or bool(name) != bool(right_name) and (
            ours.operators and right.operators
        ):
            return self._as_equations(ours, right)
        if ours.operators and right.operators and not name:
            return ours.operators == right.operators and all(
                self.same(one, other, depth) for one, other in zip(ours.sides, right.sides)
            ) or self._as_equations(ours, right)
        if _wordy([side for group in (*values, *right_values) for side in group]):
            return False  # right = left
        return any(
            all(self.same(one, other, depth) for one in group for other in other_group)
            for group in values for other_group in right_values
        ) and self._consistent(values) and self._consistent(right_values)

    def _consistent(self, values: list[list[str]]) -> bool:
        """Whether values joined by an approximate sign are within 1 % of each other."""
        first = values[0][0]
        return all(self._library("roughly", first, group[0]) if is_mathematics(first) and is_mathematics(group[0]) else False
                   for group in values[1:])

    def _as_equations(self, ours: "_Relation", right: "_Relation") -> bool:
        if ours.operators != ("=",) or right.operators != ("=",):
            return False
        if not all(is_mathematics(side) for side in (*ours.sides, *right.sides)):
            return False
        return self._library("equation", "=".join(ours.sides), "=".join(right.sides))


class _Quantity(NamedTuple):
    head: str
    unit: Unit | None


def _quantity(text: str, gold: bool) -> _Quantity | None:
    """Split a constant from its unit; None if the text is not a constant with or without a unit.

    A single letter right behind a number may be a variable: `5m` of a prediction has a unit, `5m` of the right answer has not.
    """
    if found := _DEGREES.fullmatch(text):
        value = Fraction(found[1]) + Fraction(found[2]) / 60 + Fraction(found[3] or 0) / 3600
        return _Quantity(f"\\frac{{{value.numerator}}}{{{value.denominator}}}", parse_unit("°"))
    if found := _CURRENCY.match(text):
        inner = _quantity(found[1] + text[found.end() :], gold)
        if inner is None or (inner.unit and inner.unit.dimensions):
            return None
        scale = inner.unit.scale if inner.unit else Fraction(1)
        return _Quantity(inner.head, parse_unit(found[2])._replace(scale=scale))
    if parse_number(text) is not None or is_constant(text):
        return _Quantity(text, None)
    for place in range(max(1, len(text) - 40), len(text)):
        head, tail = text[:place], text[place:]
        if tail[0].isdigit() or tail[0] in " )}^_" or not head.strip():
            continue
        if head[-1].isalpha() and head[-1].isascii() and tail[0].isalpha() and tail[0].isascii():
            continue
        head = head.rstrip()
        spaced = text[place - 1] == " "
        glued = not spaced and len(tail) == 1 and tail.isalpha() and tail.isascii()
        if glued and (gold or tail not in "mghsL" or re.fullmatch(r"\d{1,3}|\d+\.\d+", head) is None):
            continue
        if (parse_number(head) is None and not is_constant(head)) or (unit := parse_unit(tail)) is None:
            continue
        return _Quantity(head, unit)
    return None


def _rescaled(number: Number, ratio: Fraction) -> Number:
    return Number(number.value * ratio, number.digits, -(10**6)) if number.digits and number.digits >= 15 else Number(
        number.value * ratio
    )


class _Parts(NamedTuple):
    """joined: by and, or; "," for commas alone."""

    items: list[str]
    ordered: bool
    joined: str


def _split(text: str, *, ordered: bool = False) -> _Parts:
    items, joined, start, depth, place = [], ",", 0, 0, 0
    while place < len(text):
        depth += (text[place] in OPEN) - (text[place] in CLOSE)
        if depth == 0 and (found := _SEPARATOR.match(text, place)):
            if parse_number(text[start:]) is None and not (found[0] == "," and _thousands(text, place)):
                items.append(text[start:place].strip())
                joined = found[0] if found[0] not in ",;" else joined
                start = found.end()
            place = found.end()
        else:
            place += 1
    items.append(text[start:].strip())
    return _Parts([item for item in items if item], ordered, joined)


def _listed(predicted: str, gold: str) -> "tuple[_Parts, _Parts]":
    """Split both; a list in brackets is opened if the other one is bare: {1,2} and 1,2; (1,2) and 1,2; [1,2,3] and 1,2,3."""
    parts, right = _split(predicted), _split(gold)
    if len(parts.items) > 1 and (group := _group(gold)) and (group.brackets in ("⦃⦄", "()") or len(parts.items) > 2):
        return parts, group.parts
    if len(right.items) > 1 and (group := _group(predicted)) and (group.brackets in ("⦃⦄", "()") or len(right.items) > 2):
        return group.parts, right
    return parts, right


def _thousands(text: str, place: int) -> bool:
    """Whether the comma separates thousands: 12,345 but not 1,2 or 1,000,2."""
    head = re.search(r"(?<![\d.,])\d{1,3}(?:,\d{3})*$", text[:place])
    return head is not None and re.match(r"\d{3}(?:,\d{3})*(?![\d,])", text[place + 1 :]) is not None


class _Group(NamedTuple):
    brackets: str
    parts: _Parts


def _group(text: str) -> _Group | None:
    if text[0] in OPEN and closing(text, 0) == len(text) - 1:
        brackets = (text[0] + text[-1]).replace("{", "⦃").replace("}", "⦄")
        parts = _split(text[1:-1], ordered=brackets != "⦃⦄")
        if len(parts.items) > 1 or brackets in ("()", "⦃⦄") and parts.items:
            return _Group(brackets, parts)
    return None


def _bare(text: str) -> str:
    """Drop parentheses around one value."""
    while text.startswith("(") and closing(text, 0) == len(text) - 1 and len(_split(text[1:-1]).items) == 1:
        text = text[1:-1]
    return text


def _both_signs(text: str) -> str:
    if "\\pm" not in text:
        return text
    positive = text.replace("\\pm", "+").replace("=+", "=").lstrip("+")
    return positive + "," + text.replace("\\pm", "-")


class _Relation(NamedTuple):
    text: str
    sides: tuple[str, ...]
    operators: tuple[str, ...]


def _relation(text: str) -> _Relation:
    sides, operators, start, depth, place = [], [], 0, 0, 0
    while place < len(text):
        depth += (text[place] in OPEN) - (text[place] in CLOSE)
        if depth == 0 and (found := _RELATION.match(text, place)):
            sides.append(text[start:place].strip())
            operators.append(found[0])
            start = place = found.end()
        else:
            place += 1
    return _Relation(text, (*sides, text[start:].strip()), tuple(operators))


def _increasing(relation: _Relation) -> _Relation:
    r"""Turn x > 3 into 3 < x."""
    if relation.operators and set(relation.operators) <= {">", "\\geq", "="} and set(relation.operators) != {"="}:
        return relation._replace(
            sides=relation.sides[::-1], operators=tuple(_MIRRORED[each] for each in relation.operators[::-1])
        )
    return relation


class _Interval(NamedTuple):
    name: str
    brackets: str
    ends: tuple[str, str]


def _interval(relation: _Relation) -> _Interval | None:
    """Return the interval of 1 < x \\leq 2, x < 2, < 2 or (1, 2]."""
    sides, operators = relation.sides, relation.operators
    if not operators:
        group = _group(relation.text)
        if group and len(group.parts.items) == 2 and group.brackets in ("()", "(]", "[)", "[]"):
            return _Interval("", group.brackets, tuple(group.parts.items))
        return None
    if not set(operators) <= {"<", "\\leq"}:
        return None
    marks = [operator == "<" for operator in operators]
    if len(sides) == 3 and _is_name(sides[1]):
        return _Interval(sides[1], ("(" if marks[0] else "[") + (")" if marks[1] else "]"), (sides[0], sides[2]))
    if len(sides) == 2 and (_is_name(sides[0]) or not sides[0]):
        return _Interval(sides[0], "(" + (")" if marks[0] else "]"), ("-\\infty", sides[1]))
    if len(sides) == 2 and (_is_name(sides[1]) or not sides[1]):
        return _Interval(sides[1], ("(" if marks[0] else "[") + ")", (sides[0], "\\infty"))
    return None


def _is_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None and text not in ("\\pi", "e", "\\infty")


def _named(relation: _Relation) -> tuple[str, list[list[str]]]:
    """Return the name of x = a = b ≈ c, "" without one, and the values: [[a, b], [c]]."""
    groups: list[list[str]] = [[]]
    for place, side in enumerate(relation.sides):
        if place and relation.operators[place - 1] == "\\approx":
            groups.append([])
        if side:
            groups[-1].append(side)
    name = ""
    if relation.operators:
        if _is_name(relation.sides[0]):
            name = groups[0].pop(0)
        elif len(relation.sides) > 1 and relation.sides[0] and _is_name(relation.sides[-1]):
            name = groups[-1].pop()
    return name, [group for group in groups if group]


def _names(items: list[str]) -> set[str]:
    return {_named(_relation(item))[0] for item in items} - {""}


def _wordy(items: list[str]) -> bool:
    return any(re.search(r"(?<![\\A-Za-z])[A-Za-z]{3}", item) and not is_mathematics(item) for item in items)


def _key(text: str) -> str:
    r"""What words share. \angle CBA is \angle ABC: the vertex is in the middle."""
    text = words(text)
    found = re.fullmatch(r"\\angle ?([A-Z])([A-Z])([A-Z])", text)
    return f"\\angle {min(found[1], found[3])}{found[2]}{max(found[1], found[3])}" if found else text
