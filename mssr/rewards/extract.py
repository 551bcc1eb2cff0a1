"""Extracts the boxed answer of a response, and checks its format."""

import re

_BOX = re.compile(r"\\boxed\s*\{")


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
