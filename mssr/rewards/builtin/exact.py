"""Exact text: whether the response's answer is the right text, spelled as one likes."""

from mssr.errors import UserError
from mssr.rewards.extract import answered, right_answer
from mssr.rewards.row import Row
from mssr.rewards.text import spelled, spelled_as_squad

USES_IMAGES = False

_RULES = {"text": spelled, "case": lambda text: spelled(text, case=True), "squad": spelled_as_squad}


def exact(response: str, row: Row, *, rule: str = "text") -> float:
    """Return 1 if the response's answer is the row's, or one of its column `answers`, else 0.

    rule: what is ignored. text: case, kinds of spaces and characters (NFKC), a first article, quotes and punctuation at the
    ends. case: the same, but case and articles count. squad: as SQuAD's evaluation does.
    """
    spell = _RULES[rule]
    said = spell(answered(response))
    return float(bool(said) and any(said == spell(each) for each in _right_ones(row)))


def _right_ones(row: Row) -> list[str]:
    """Return the answers of the row: a list of texts, or SQuAD's {"text": [...]}."""
    several = (row.columns or {}).get("answers")
    several = several.get("text") if isinstance(several, dict) else several
    if isinstance(several, list | tuple) and several:
        return [*map(str, several), *filter(None, [row.answer])]
    return [right_answer(row)]


def _check(*, rule: str = "text") -> None:
    if rule not in _RULES:
        raise UserError(f"rule: must be one of {', '.join(_RULES)}, got {rule!r}")


exact.check = _check
