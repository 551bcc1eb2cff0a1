"""Answers that are options of a question: B, (B), B. 12 cm, option B; several: A, C."""

import re
from typing import NamedTuple

_OPTION = re.compile(
    r"[(\[]?([A-J])[)\]]?[.:,)]?(?: is (?:the )?(?:correct|right)(?: (?:answer|option|choice))?)?"
    r"|\(([a-j])\)|([a-j])[.)]"
)
_OPTION_TEXT = re.compile(
    r"(?:\(([A-J])\)|([A-J])(?:[.:)](?!$)|,(?=[^\sA-J(])))\s*([^\s^_+*/=\\].*|\\[a-z].*)", re.DOTALL
)
# What takes an option back or adds a second one: B. 6; not B; or B; B alone.
_OTHER_OPTION = re.compile(
    r"(?<![A-Za-z(])[A-J](?:[.:)]\s+\S|[.:),]\d)|(?<![A-Za-z])\([A-J]\)|^[A-J]$"
    r"|\b(?i:is|or|not|but|answer|option|choice|choose)\s+[A-J](?![\w'])|\b(?:not correct|incorrect|wrong)\b"
)
_OPTION_WORD = re.compile(r"(?:(?:option|choice)\s*:?|(?:选项|故?应?选)[为:]?)\s*", re.IGNORECASE)
_LETTERS = re.compile(r"[(\[]?[A-H][)\]]?(?:(?:\s*(?:,|;|&|and|和|与)\s*|\s*)[(\[]?[A-H][)\]]?)+")


class Option(NamedTuple):
    """letters: in the order in which they are written. text: what is written beside a single letter. ordered: AC."""

    letters: str
    text: str | None
    ordered: bool = False


def parse_option(text: str) -> Option | None:
    """Return the option that the cleaned text is, or None."""
    word = _OPTION_WORD.match(text)
    text = text[word.end() :] if word else text
    if word and re.fullmatch("[a-j]", text):
        text = text.upper()
    if found := _OPTION.fullmatch(text.strip()):
        return Option((found[1] or found[2] or found[3]).upper(), None)
    if _LETTERS.fullmatch(text):
        letters = "".join(re.findall("[A-H](?![a-z])", text))
        if len(set(letters)) == len(letters):
            return Option(letters, None, ordered=letters == text)  # AC may be a line, A, C is not
    if found := _OPTION_TEXT.fullmatch(text):
        return Option(found[1] or found[2], found[3])
    return None


def names_another(text: str) -> bool:
    """Whether the text of an option takes it back, or names another one."""
    return _OTHER_OPTION.search(text) is not None
