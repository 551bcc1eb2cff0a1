"""The structure of an answer: lists, brackets, equations and inequalities, intervals. All texts are squeezed ones."""

import re
from typing import NamedTuple

from mssr.rewards.normalise import CLOSE, OPEN, closing
from mssr.rewards.numbers import parse_number

_RELATION = re.compile(r"\\(?:leq|geq|neq|approx|in)(?![a-zA-Z])|[<>=]")
_SEPARATOR = re.compile(r"[,;]|\b(?:and|or)\b|[和或及与且]|\\(?:cup|lor|vee|land|wedge)(?![a-zA-Z])")
_JOINED = {"和": "and", "及": "and", "与": "and", "且": "and", "\\land": "and", "\\wedge": "and", ",": ",", ";": ","}
_LETTER = r"[A-Za-z]{1,4}|\\(?:alpha|beta|gamma|delta|theta|lambda|mu|rho|sigma|phi|omega|Delta)"
_NAME = re.compile(
    r"\([a-z],[a-z]\)"  # (x, y)
    r"|\\angle ?\d"
    r"|\|(?:[A-Z]{1,2}|\\(?:vec|overrightarrow)\{[A-Za-z]{1,2}\})\|"  # |AB|
    r"|(?:m?\\(?:angle|triangle|overline|overrightarrow|vec|sin|cos|tan) ?)?"
    rf"\{{?(?:{_LETTER}|[a-zA-Z]{{2,}}(?: [a-zA-Z]+){{0,4}}|[\u4e00-\u9fff]{{1,8}})\}}?"
    r"'?(?:_\{\\?[\w ]+\})?'?(?:\(\w{1,3}\))?"  # x_{1}', f(x)
)
_BUILDER = re.compile(r"⦃([a-z])(?:\\in [A-Z])?[|:](.+)⦄")
_MIRRORED = {"<": ">", ">": "<", "\\leq": "\\geq", "\\geq": "\\leq", "=": "="}


class Parts(NamedTuple):
    """joined: by "and" or "or"; "," for commas alone, "mixed" for both words."""

    items: list[str]
    ordered: bool
    joined: str


def split_list(text: str, *, ordered: bool = False) -> Parts:
    items, joined, start, depth, place = [], ",", 0, 0, 0
    while place < len(text):
        depth += (text[place] in OPEN) - (text[place] in CLOSE)
        if depth == 0 and (found := _SEPARATOR.match(text, place)):
            if parse_number(text[start:]) is None and not (found[0] == "," and _thousands(text, place)):
                items.append(text[start:place].strip())
                word = found[0] if found[0] in ("and", "or") else _JOINED.get(found[0], "or")
                joined = word if joined in (",", word) else joined if word == "," else "mixed"
                start = found.end()
            place = found.end()
        else:
            place += 1
    items.append(text[start:].strip())
    return Parts([item for item in items if item], ordered, joined)


def split_lists(predicted: str, gold: str) -> tuple[Parts, Parts]:
    """Split both; a list in brackets is opened if the other one is bare: {1,2} and 1,2; (1,2) and 1,2; [1,2,3] and 1,2,3."""
    parts, right = split_list(predicted), split_list(gold)
    if len(parts.items) > 1 and (group := grouped(gold)) and (group.brackets in ("⦃⦄", "()") or len(parts.items) > 2):
        return parts, group.parts
    if (
        len(right.items) > 1
        and (group := grouped(predicted))
        and (group.brackets in ("⦃⦄", "()") or len(right.items) > 2)
    ):
        return group.parts, right
    return parts, right


def _thousands(text: str, place: int) -> bool:
    """Whether the comma separates thousands: 12,345 but not 1,2 or 1,000,2."""
    head = re.search(r"(?<![\d.,])\d{1,3}(?:,\d{3})*$", text[:place])
    return head is not None and re.match(r"\d{3}(?:,\d{3})*(?![\d,])", text[place + 1 :]) is not None


class Group(NamedTuple):
    brackets: str
    parts: Parts


def grouped(text: str) -> Group | None:
    if text[0] in OPEN and closing(text, 0) == len(text) - 1:
        brackets = (text[0] + text[-1]).replace("{", "⦃").replace("}", "⦄")
        parts = split_list(text[1:-1], ordered=brackets != "⦃⦄")
        if len(parts.items) > 1 or (brackets in ("()", "⦃⦄") and parts.items):
            return Group(brackets, parts)
    return None


def without_brackets(text: str) -> str:
    """Drop parentheses around one value."""
    while text.startswith("(") and closing(text, 0) == len(text) - 1 and len(split_list(text[1:-1]).items) == 1:
        text = text[1:-1]
    return text


def both_signs(text: str) -> str:
    if "\\pm" not in text:
        return text
    positive = text.replace("\\pm", "+").replace("=+", "=").lstrip("+")
    return positive + "," + text.replace("\\pm", "-")


class Relation(NamedTuple):
    text: str
    sides: tuple[str, ...]
    operators: tuple[str, ...]


def related(text: str) -> Relation:
    sides, operators, start, depth, place = [], [], 0, 0, 0
    while place < len(text):
        depth += (text[place] in OPEN) - (text[place] in CLOSE)
        if depth == 0 and (found := _RELATION.match(text, place)):
            sides.append(text[start:place].strip())
            operators.append(found[0])
            start = place = found.end()
        else:
            place += 1
    return Relation(text, (*sides, text[start:].strip()), tuple(operators))


def increasing(relation: Relation) -> Relation:
    r"""Turn x > 3 into 3 < x."""
    if relation.operators and set(relation.operators) <= {">", "\\geq", "="} and set(relation.operators) != {"="}:
        return relation._replace(
            sides=relation.sides[::-1], operators=tuple(_MIRRORED[each] for each in relation.operators[::-1])
        )
    return relation


class Interval(NamedTuple):
    name: str
    brackets: str
    ends: tuple[str, str]


def as_interval(relation: Relation) -> Interval | None:
    """Return the interval of 1 < x \\leq 2, x < 2, < 2 or (1, 2]."""
    sides, operators = relation.sides, relation.operators
    if not operators:
        group = grouped(relation.text)
        if group and len(group.parts.items) == 2 and group.brackets in ("()", "(]", "[)", "[]"):
            return Interval("", group.brackets, tuple(group.parts.items))
        return None
    if not set(operators) <= {"<", "\\leq"}:
        return None
    marks = [operator == "<" for operator in operators]
    if len(sides) == 3 and is_name(sides[1]):
        return Interval(sides[1], ("(" if marks[0] else "[") + (")" if marks[1] else "]"), (sides[0], sides[2]))
    if len(sides) == 2 and (is_name(sides[0]) or not sides[0]):
        return Interval(sides[0], "(" + (")" if marks[0] else "]"), ("-\\infty", sides[1]))
    if len(sides) == 2 and (is_name(sides[1]) or not sides[1]):
        return Interval(sides[1], ("(" if marks[0] else "[") + ")", (sides[0], "\\infty"))
    return None


def is_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None and text not in ("\\pi", "e", "\\infty")


def name_and_values(relation: Relation) -> tuple[str, list[list[str]]]:
    """Return the name of x = a = b ≈ c, "" without one, and the values: [[a, b], [c]]."""
    groups: list[list[str]] = [[]]
    for place, side in enumerate(relation.sides):
        if place and relation.operators[place - 1] == "\\approx":
            groups.append([])
        if side:
            groups[-1].append(side)
    name = ""
    if relation.operators:
        if is_name(relation.sides[0]):
            name = groups[0].pop(0)
        elif len(relation.sides) > 1 and relation.sides[0] and is_name(relation.sides[-1]):
            name = groups[-1].pop()
    return name, [group for group in groups if group]


def without_builder(text: str) -> str:
    """Return the condition of a set: x<1 of {x|x<1}."""
    found = _BUILDER.fullmatch(text)
    condition = found and re.sub(r"\\(?:leq|geq|neq)(?![a-zA-Z])", "<", found[2])
    return found[2] if found and re.search("[<>]", condition) and not re.search("[=⦃|]", condition) else text


def names_of(items: list[str]) -> set[str]:
    return {name_and_values(related(item))[0] for item in items} - {""}
