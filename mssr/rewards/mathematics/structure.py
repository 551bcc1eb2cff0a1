"""The structure of an answer: lists, brackets, equations and inequalities, intervals. All texts are squeezed ones."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from mssr.rewards.mathematics.normalise import CLOSE, OPEN, closing
from mssr.rewards.mathematics.vocabulary import GREEK, is_mathematics

_RELATION = re.compile(r"\\(?:leq|geq|neq|approx|in|parallel|perp|cong|sim|su[bp]set(?:eq|neq)?)(?![a-zA-Z])|[<>=]")
_SEPARATOR = re.compile(r"[,;]|\b(?:and|or)\b|[和或及与且]|\\cup(?![a-zA-Z])")
_JOINED = {",": ",", ";": ",", "or": "or", "或": "or", "\\cup": "or"}
_NAME = re.compile(
    r"\\angle ?\d"
    r"|\|(?:[A-Z]{1,2}|\\(?:vec|overrightarrow)\{[A-Za-z]{1,2}\})\|"  # |AB|
    r"|(?:\\(?:angle|triangle|overline|overrightarrow|vec|hat|bar|sin|cos|tan) ?)?"
    rf"\{{?(?:[A-Za-z]{{1,4}}|\\(?:{'|'.join(GREEK)})|[a-zA-Z]{{2,}}(?: [a-zA-Z]+){{0,4}}|[\u4e00-\u9fff]{{1,8}})\}}?"
    r"'?(?:_\{\\?[\w ]+\}|\^\{-1\}(?=\())?'?(?:\(\w{1,3}\))?"  # x_{1}', f(x)
)
_MATRIX = re.compile(r"\\begin\{[pb]?matrix\}((?:(?!\\begin).)*)\\end\{[pb]?matrix\}")
_BUILDER = re.compile(r"⦃[a-z](?:\\in ?(?:R|\\mathbb\{R\}))?[|:](.*(?:[<>]|\\[lgn]eq).*)⦄")
_POINT = re.compile(r"([A-Z])'?(\(.*[,;].*\))")
_MIRRORED = {">": "<", "\\geq": "\\leq", "\\supset": "\\subset", "\\supseteq": "\\subseteq"}


class Parts(NamedTuple):
    """joined: by "and" or "or"; "," for commas alone, "mixed" for both words."""

    items: list[str]
    ordered: bool
    joined: str


def _outside(pattern: re.Pattern, text: str) -> Iterator[re.Match]:
    """Find the pattern where no bracket is open."""
    depth = place = 0
    while place < len(text):
        depth += (text[place] in OPEN) - (text[place] in CLOSE)
        found = pattern.match(text, place) if depth == 0 else None
        if found:
            yield found
        place = found.end() if found else place + 1


def split_list(text: str, *, ordered: bool = False) -> Parts:
    items, joined, start = [], ",", 0
    for found in _outside(_SEPARATOR, text):
        if found[0] == "," and _thousands(text, found.start()):
            continue
        items.append(text[start : found.start()].strip())
        word = _JOINED.get(found[0], "and")
        joined = word if joined in (",", word) else joined if word == "," else "mixed"
        start = found.end()
    items.append(text[start:].strip())
    return Parts([item for item in items if item], ordered, joined)


def split_lists(predicted: str, gold: str) -> tuple[Parts, Parts]:
    """Split both; a list in brackets is opened if the other one is bare: {1,2} and 1,2; [yes,no] and yes,no."""
    parts, right = split_list(predicted), split_list(gold)
    if len(parts.items) > 1:
        return parts, _opened(gold) or right
    return (len(right.items) > 1 and _opened(predicted)) or parts, right


def _opened(text: str) -> Parts | None:
    """Return the parts of a list in brackets, unless it may be an interval: [1,2]."""
    group = grouped(text)
    if group and (group.brackets in ("⦃⦄", "()") or len(group.parts.items) > 2 or wordy(group.parts.items)):
        return group.parts
    return None


def wordy(items: list[str]) -> bool:
    """Whether there are words among the items."""
    return any(re.search(r"(?<![\\A-Za-z])[A-Za-z]{3}", item) and not is_mathematics(item) for item in items)


def _thousands(text: str, place: int) -> bool:
    """Whether the comma separates thousands: 12,345 but not 1,2 or 1,000,2."""
    head = re.search(r"(?<![\d.,])\d{1,3}(?:,\d{3})*$", text[:place])
    return head is not None and re.match(r"\d{3}(?:,\d{3})*(?![\d,])", text[place + 1 :]) is not None


class Group(NamedTuple):
    brackets: str
    parts: Parts


def grouped(text: str) -> Group | None:
    if text and text[0] in OPEN and closing(text, 0) == len(text) - 1:
        brackets = (text[0] + text[-1]).replace("{", "⦃").replace("}", "⦄")
        parts = split_list(text[1:-1], ordered=brackets != "⦃⦄")
        return Group(brackets, parts) if parts.items else None
    return None


def plain(text: str) -> str:
    """Return the text without brackets around one value, and with one spelling for what has several."""
    for rewrite in (_condition, _without_brackets, _chained, _by_coordinates, _both_signs):
        text = rewrite(text)
    return text


def _condition(text: str) -> str:
    """Turn {x|x<1} into x<1."""
    found = _BUILDER.fullmatch(text)
    return found[1] if found else text


def _without_brackets(text: str) -> str:
    """Turn (5) and {5} into 5."""
    while (group := grouped(text)) and group.brackets in ("()", "⦃⦄") and len(group.parts.items) == 1:
        if group.parts.items == ["\\emptyset"]:
            break
        text = text[1:-1]
    return text


def matrices(*texts: str) -> tuple[str, ...]:
    """Write both matrices as lists, unless one is calculated with."""
    written = tuple(map(_rows, texts))
    return texts if any("\\begin" in text for text in written) else written


def _rows(text: str) -> str:
    """Write a matrix as [[1,2],[3,4]], and a column as ⟨1,2⟩."""
    if found := _MATRIX.fullmatch(text):
        rows = [row.split("&") for row in re.split(r"\\\\(?!$)", found[1].removesuffix("\\\\"))]
    else:
        group = grouped(text)
        inner = [grouped(item) for item in group.parts.items] if group and group.brackets == "[]" else [None]
        if any(row is None or row.brackets != "[]" for row in inner):
            return text
        rows = [row.parts.items for row in inner]
    if len(rows) > 1 and all(len(row) == 1 for row in rows):
        return f"⟨{';'.join(row[0] for row in rows)}⟩"
    return f"[{';'.join('[' + ';'.join(row) + ']' for row in rows)}]"


def _chained(text: str) -> str:
    """Turn 1<x and x<2 into 1<x<2."""
    parts = split_list(text)
    if parts.joined == "and" and len(parts.items) == 2:
        relations = [increasing(related(item)) for item in parts.items]
        for one, other in (relations, relations[::-1]):
            bounds = set(one.operators + other.operators) <= {"<", "\\leq"}
            if bounds and len(one.sides) == len(other.sides) == 2 and one.sides[1] == other.sides[0]:
                return f"{one.sides[0]}{one.operators[0]} {one.sides[1]}{other.operators[0]} {other.sides[1]}"
    return text


def _by_coordinates(text: str) -> str:
    """Turn (x,y)=(1,2) into x=1,y=2."""
    relation = related(text)
    groups = [grouped(side) for side in relation.sides]
    if relation.operators != ("=",) or None in groups or len(groups[0].parts.items) != len(groups[1].parts.items):
        return text
    return ",".join(f"{name}={value}" for name, value in zip(*(group.parts.items for group in groups)))


def _both_signs(text: str) -> str:
    """Turn 1\\pm 2 into 1+2,1-2."""
    if "\\pm" not in text:
        return text
    positive = text.replace("\\pm", "+").replace("=+", "=").lstrip("+")
    return positive + "," + text.replace("\\pm", "-")


def pointed(text: str) -> tuple[str, str]:
    """Return the name of a point, "" without one, and its coordinates."""
    found = _POINT.fullmatch(text)
    return (found[1], found[2]) if found and grouped(found[2]) else ("", text)


class Relation(NamedTuple):
    text: str
    sides: tuple[str, ...]
    operators: tuple[str, ...]


def related(text: str) -> Relation:
    sides, operators, start = [], [], 0
    for found in _outside(_RELATION, text):
        sides.append(text[start : found.start()].strip())
        operators.append(found[0])
        start = found.end()
    return Relation(text, (*sides, text[start:].strip()), tuple(operators))


def increasing(relation: Relation) -> Relation:
    r"""Turn x > 3 into 3 < x."""
    if relation.operators and set(relation.operators) <= _MIRRORED.keys():
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
        if group and len(group.parts.items) == 2:
            return Interval("", group.brackets, tuple(group.parts.items))
        return None
    if not set(operators) <= {"<", "\\leq"}:
        return None
    first, last = "(" if operators[0] == "<" else "[", ")" if operators[-1] == "<" else "]"
    named = [not side or is_name(side) for side in sides]
    if len(sides) == 3 and named[1]:
        return Interval(sides[1], first + last, (sides[0], sides[2]))
    if len(sides) == 2 and named[0]:
        return Interval(sides[0], "(" + last, ("-\\infty", sides[1]))
    if len(sides) == 2 and named[1]:
        return Interval(sides[1], first + ")", (sides[0], "\\infty"))
    return None


def is_name(text: str) -> bool:
    """Whether the text is a name, or a ratio of names: AB:CD."""
    return all(map(_NAME.fullmatch, text.split(":")))


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
        elif is_name(relation.sides[-1]):
            name = groups[-1].pop()
    return name, [group for group in groups if group]


def names_of(items: list[str]) -> set[str]:
    return {name_and_values(related(item))[0] for item in items} - {""}
