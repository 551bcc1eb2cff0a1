r"""Answers that are right and answers that are nearly right, from a table: answers.csv.

Its rows follow the conventions of geometry, chart and multiple-choice data sets: `response` is what a \boxed{} holds,
`answer` the data set's answer, `grade` what a teacher says.
"""

import csv
import random
from collections import Counter
from pathlib import Path

import pytest

from mssr.rewards.mathematics.compare import same_answer
from mssr.rewards.mathematics.equal import equal

with (Path(__file__).parent / "answers.csv").open(newline="", encoding="utf-8") as file:
    ROWS = list(csv.DictReader(file))


def test_the_table_is_large_and_balanced():
    grades = Counter(row["grade"] for row in ROWS)
    assert len(ROWS) >= 400 and set(grades) == {"right", "wrong"} and min(grades.values()) > len(ROWS) / 3
    assert len({(row["response"], row["answer"]) for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("kind", dict.fromkeys(row["kind"] for row in ROWS))
def test_answers(kind):
    rows = [(row["response"], row["answer"], row["grade"]) for row in ROWS if row["kind"] == kind]
    graded = [(one, other, "right" if equal(one, other) else "wrong") for one, other, _ in rows]
    assert graded == rows


def test_every_answer_equals_itself():
    """Even in another spelling of the same characters, and without help by the library."""
    for answer in {row["answer"] for row in ROWS} - {""}:
        assert same_answer(f" {answer} ", answer, None), answer


@pytest.mark.parametrize(
    "piece",
    ["1aand ", "1" * 500 + "." + "1" * 520, "1" * 980 + "'" * 40, "A.", "(A) ", "$1,", "\\frac{", "1\\pm ", "A(1,"],
)
@pytest.mark.timeout(30)
def test_a_long_answer_that_repeats_itself_takes_no_longer_than_others(piece):
    """Patterns that try all ways to divide a text among their parts would take minutes, or never end."""
    for end in ("", "!", "x", "1"):
        for gold in ("5", "1,2", "A. 12 cm", "x<3"):
            assert not same_answer((piece * 1024)[: 1024 - len(end)] + end, gold, lambda *question: False)


def test_no_text_makes_the_comparison_fail():
    """Cut, joined and disturbed answers: no exception, and the library only gets what it may read."""
    random_ = random.Random(0)
    texts = [row[column] for row in ROWS for column in ("response", "answer")]
    asked = []
    for _ in range(3000):
        one, other = random_.choice(texts), random_.choice(texts)
        cut, place = random_.randrange(len(one) + 1), random_.randrange(len(other) + 1)
        mixed = one[:cut] + random_.choice("()[]{}\\$%^_,;=<≤°√'π 元5\ud800") + other[place:]
        assert same_answer(mixed, other, lambda *question: bool(asked.append(question))) in (True, False)
    assert asked and not any("felt" in text or "yes" in text for _, *question in asked for text in question)
