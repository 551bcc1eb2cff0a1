"""Multiple choice: whether the response chooses the right option, by its letter or its text."""

import ast
import json
import re
from collections.abc import Mapping

from mssr.errors import UserError
from mssr.rewards.extract import last_line, right_answer, stated
from mssr.rewards.mathematics.normalise import clean
from mssr.rewards.mathematics.options import names_another, parse_option
from mssr.rewards.option_checks import require_number
from mssr.rewards.row import Row
from mssr.rewards.text import spelled

USES_IMAGES = False

LETTERS = "ABCDEFGHIJ"
MAX_CHARS = 1024  # of a stated answer, or a last line
_MARK = re.compile(r"(?:(?<=\s)|^)(?:\(([A-J])\)|([A-J])[.):])[ \t]{0,3}")
_REASON = re.compile(r"[(\[]?([A-J])[)\]]?[.,;:]? (?:because|since|as)\b(.*)")
_BRACKETED = re.compile(r"\(([A-J])\)")
_DENIAL = re.compile(r"\b(?:not|except|wrong|incorrect|rather than)\b|n't\b", re.IGNORECASE)


def choice(response: str, row: Row, *, first: int | None = None) -> float:
    r"""Return 1 if the response chooses the right option, else 0; two different letters are wrong.

    The choice is the last `\boxed{}`, <answer></answer> or "Answer:", else the last line: `B`, `(B)`, `B. 12 cm`, or the
    text of an option. Options are read from the row's column `options` or `choices`, else from the problem: `A. 12 cm`.
    first: the number of the first option, for rows whose answer is the position of the right one.
    """
    options = _of_columns(row) or _of_problem(row.problem)
    right = _right_letters(right_answer(row), options, first)
    said = stated(response)
    if said is None:
        said = last_line(response)
        chosen = _letters(said, options) or _only_bracketed(said)
    else:
        chosen = _letters(said, options)
    return float(chosen == right)


def _right_letters(answer: str, options: dict[str, str], first: int | None) -> str:
    if first is not None and answer.strip().isascii() and answer.strip().isdigit():
        position = int(answer) - first
        if 0 <= position < (len(options) or len(LETTERS)):
            return LETTERS[position]
    elif letters := _letters(answer, options):
        return letters
    raise UserError(
        f"the answer {answer[:80]!r} is not an option; write its letter, A to J, or its text, with the options in a column "
        "`options`; where it is the option's position, set the option `first` (0 or 1)"
    )


def _letters(text: str, options: dict[str, str]) -> str | None:
    """Return the letters that the text chooses, in order; None if it chooses none, or does not say which."""
    if len(text) > MAX_CHARS:
        return None
    written = clean(text)
    option = parse_option(written.upper() if re.fullmatch("[a-j]", written) else written)
    if option and len(option.letters) == 1 and option.text is None:  # before an option whose text is a letter
        return option.letters
    if same := _with_text(text, options):
        return same[0] if len(same) == 1 else None
    if found := _REASON.fullmatch(written):
        return None if names_another(found[2]) else found[1]
    if option is None or (option.text and names_another(option.text)):
        return None
    if option.text and options:  # else the text may be the option's, whatever it says
        same = _with_text(option.text, options)
        if option.letters not in same if same else _DENIAL.search(option.text):
            return None
    return "".join(sorted(option.letters))


def _with_text(text: str, options: dict[str, str]) -> list[str]:
    """Return the letters of the options with this text."""
    return [letter for letter, option in options.items() if spelled(option) == spelled(text)]


def _only_bracketed(line: str) -> str | None:
    """Return the letter of a sentence with one (B)."""
    found = set(_BRACKETED.findall(line))
    return found.pop() if len(found) == 1 and not _DENIAL.search(line) else None


def _of_columns(row: Row) -> dict[str, str]:
    """Return the options of a column, by letter: a list, {"A": ...}, {"text": [...]}, or one of these as text."""
    columns = row.columns or {}
    given = columns.get("options") or columns.get("choices")
    if isinstance(given, str):
        given = _parsed(given)
    if isinstance(given, Mapping):
        if isinstance(given.get("text"), list | tuple):
            given = given["text"]
        else:
            return {key: str(text) for key, text in given.items() if key in LETTERS and text is not None}
    if not isinstance(given, list | tuple):
        return {}
    texts = [str(text) for text in given]
    marks = [_MARK.match(text) for text in texts]
    if all(mark and (mark[1] or mark[2]) == letter for mark, letter in zip(marks, LETTERS)):
        texts = [text[mark.end() :] for mark, text in zip(marks, texts)]
    return dict(zip(LETTERS, texts))


def _parsed(text: str):
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError):
            continue
    return None


def _of_problem(problem: str) -> dict[str, str]:
    """Return the options that the problem lists, A first: in lines of their own, or side by side."""
    options, start, marks = {}, {}, list(_MARK.finditer(problem))
    for mark, following in zip(marks, [*marks[1:], None]):
        letter = mark[1] or mark[2]
        if letter == "A":
            start = {}
        elif letter != LETTERS[len(start) :][:1]:
            continue
        text = problem[mark.end() : following.start() if following else len(problem)]
        start[letter] = text.strip().partition("\n")[0].strip()
        if len(start) > 1:
            options = start
    return options


def _check(*, first: int | None = None) -> None:
    if first is not None:
        require_number("first", first, at_least=0, at_most=1, whole=True)


choice.check = _check
