"""Extracts the answer of a response: what it boxes, tags or states, or its last line. And checks its format.

Responses are up to megabytes of anything: every search takes a time proportional to the length.
"""

import re

from mssr.errors import UserError
from mssr.rewards.row import Row

_BOX = re.compile(r"\\boxed\s*\{")
_STATEMENT = re.compile(
    r"(?:\b(?:answer|correct (?:option|choice))\b[*_]{0,3}[ \t]{0,3}(?:is\b[ \t]{0,3}:?|[:=])|答案(?:是|为|[:：])|####)"
    r"[ \t]{0,3}[*_]{0,3}",
    re.IGNORECASE,
)
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf)\s*\{([^{}]*)\}")


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last `\boxed{...}`, stripped; None without one, or if the last one is not closed.

    A response whose last box is not closed was cut: an earlier box was not its answer.
    `\{` and `\}` are characters, not braces, as in TeX.
    """
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    start = position = boxes[-1].end()
    depth = 1
    while position < len(text):
        match text[position]:
            case "\\":
                position += 1
            case "{":
                depth += 1
            case "}":
                depth -= 1
        if depth == 0:
            return text[start:position].strip()
        position += 1
    return None


def well_formed(text: str) -> bool:
    r"""Whether the text is one `<think>...</think>` with nothing before it, and after it one `\boxed{}` that is not empty."""
    if text.count("<think>") != 1 or text.count("</think>") != 1:
        return False
    before, _, rest = text.partition("<think>")
    _, closed, final = rest.partition("</think>")
    return not before.strip() and bool(closed) and len(_BOX.findall(final)) == 1 and bool(last_boxed(final))


def final(text: str) -> str:
    """Return what follows the thinking: the whole text without <think>, nothing where the thinking has no end."""
    _, closed, after = text.rpartition("</think>")
    return after if closed else "" if "<think>" in text else text


def stated(text: str) -> str | None:
    r"""Return what the response gives as its answer, thinking left out; None if it does not say so.

    It is the content of the last `\boxed{}`, else of the last <answer></answer>, else the line behind the last "Answer:",
    "answer is" or "####". "" where a box or tag is not closed: the response was cut.
    """
    text = final(text)
    if _BOX.search(text):
        return last_boxed(text) or ""
    if (start := text.rfind("<answer>")) >= 0:
        end = text.find("</answer>", start)
        return text[start + len("<answer>") : end].strip() if end >= 0 else ""
    found = max(_STATEMENT.finditer(text), key=re.Match.start, default=None)
    return found and _bare(text[found.end() :].lstrip().partition("\n")[0])


def last_line(text: str) -> str:
    """Return the last line of the response that is not blank, thinking left out; "" without one."""
    return _bare(final(text).rstrip().rpartition("\n")[2])


def answered(text: str) -> str:
    r"""Return the answer as plain text: what the response states, else its last line; without `\text{}` around it."""
    found = stated(text)
    return _TEXT.sub(r"\1", last_line(text) if found is None else found).strip()


def right_answer(row: Row) -> str:
    """Return the row's answer.

    Raises:
        UserError: the row has none.
    """
    if not row.answer.strip():
        raise UserError(
            "the row has no answer to compare with; fill in its column `answer`, or name one in data.columns"
        )
    return row.answer


def _bare(line: str) -> str:
    """Return the line without the stars of Markdown."""
    return line.replace("**", "").strip().strip("*").strip()
