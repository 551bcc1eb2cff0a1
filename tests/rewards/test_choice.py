"""Multiple choice: what a response chooses, and what the options are."""

import pytest

from mssr.errors import UserError
from mssr.rewards.builtin.choice import choice
from mssr.rewards.row import Row

TEXTS = ["11 cm", "12 cm", "a cat", "B"]  # D's text is a letter
LINES = "How long?\nA. 11 cm\nB. 12 cm\nC. a cat\nD. B"


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        (r"\boxed{B}", 1),
        (r"\boxed{\text{B}}", 1),
        (r"\boxed{(B)}", 1),
        (r"\boxed{b}", 1),
        (r"\boxed{B. 12 cm}", 1),
        (r"\boxed{B. 11 cm}", 0),  # text of A
        (r"\boxed{12 cm}", 1),
        (r"\boxed{A}", 0),
        (r"\boxed{A, B}", 0),
        (r"\boxed{B, A}", 0),
        (r"\boxed{B or A}", 0),
        (r"\boxed{AB}", 0),
        (r"\boxed{not B}", 0),
        (r"\boxed{A} no, \boxed{B}", 1),
        (r"\boxed{B} no, \boxed{A}", 0),
        (r"\boxed{B} no, \boxed{", 0),
        (r"<think>\boxed{A}?</think> \boxed{B}", 1),
        ("<think>Answer: B", 0),
        ("<answer>B</answer>", 1),
        ("<answer> (B) 12 cm </answer>", 1),
        ("<answer>A</answer> B", 0),
        ("<answer>B", 0),  # cut
        ("Answer: B", 1),
        ("**Answer:** B", 1),
        ("**Answer: B**", 1),
        ("Answer: **B**.", 1),
        ("Final answer:\nB", 1),
        ("The answer is (B).", 1),
        ("The correct option is B because 12 is more.", 1),
        ("The answer is (B), because 12 is more.", 1),
        ("The answer is B or C", 0),
        ("The answer is B because (A) is wrong.", 0),
        ("Answer: A\nAnswer: B", 1),  # the last one
        ("Answer: A dog", 0),
        ("Answer: b", 1),
        ("答案：B", 1),
        ("I think it is long.\nB.", 1),
        ("B", 1),
        ("(B)", 1),
        ("12 cm.", 1),
        ("So (B) fits.", 1),
        ("So (A) or (B) fits.", 0),
        ("(B) does not fit.", 0),
        ("(B)\nHm.", 0),
        ("B or not", 0),
        ("", 0),
        ("Ｂ", 1),
        ("Β", 0),  # a Greek letter
    ],
)
@pytest.mark.parametrize("problem", [LINES, "How long? (A) 11 cm (B) 12 cm (C) a cat (D) B"])
def test_choices(problem, response, reward):
    assert choice(response, Row(problem, "B")) == reward


@pytest.mark.parametrize(
    "columns",
    [
        {"options": TEXTS},
        {"choices": TEXTS},
        {"options": ["A. 11 cm", "B. 12 cm", "C. a cat", "D. B"]},
        {"options": dict(zip("ABCD", TEXTS))},
        {"options": dict(zip("ABCDE", [*TEXTS, None]))},
        {"choices": {"label": list("ABCD"), "text": TEXTS}},
        {"options": str(TEXTS)},
        {"options": '["11 cm", "12 cm", "a cat", "B"]'},
    ],
)
def test_options_of_a_column(columns):
    row = Row("How long?", "B", columns=columns)
    assert [choice(rf"\boxed{{{text}}}", row) for text in ("12 cm", "B. 12 cm", "11 cm", "(C)", "a cat")] == [
        1,
        1,
        0,
        0,
        0,
    ]


@pytest.mark.parametrize("answer", ["B", "(B)", "b", "B.", "B. 12 cm", "12 cm", "12 CM."])
def test_ways_to_write_the_right_option(answer):
    row = Row(LINES, answer)
    assert choice("Answer: B", row) == choice("Answer: 12 cm", row) == 1 and choice("Answer: A", row) == 0


def test_a_position_counts_from_the_number_that_is_given():
    row = Row("?", "1", columns={"choices": TEXTS})
    assert choice("B", row, first=0) == choice("A", row, first=1) == 1
    assert choice("A", row, first=0) == choice("B", row, first=1) == 0
    numbers = Row("How many?", "1", columns={"choices": ["3", "2", "1"]})
    assert choice("C", numbers) == choice("B", numbers, first=0) == 1


@pytest.mark.parametrize(
    ("answer", "columns", "first"),
    [
        ("1", {"choices": TEXTS}, None),
        ("4", {"choices": TEXTS}, 0),
        ("0", {"choices": TEXTS}, 1),
        ("13 cm", {"options": TEXTS}, None),
        ("same", {"options": ["same", "same"]}, None),
        ("12 cm", {}, None),
    ],
)
def test_an_answer_that_is_no_option_is_an_error(answer, columns, first):
    with pytest.raises(UserError, match=f"^the answer '{answer}' is not an option; write its letter"):
        choice("B", Row("?", answer, columns=columns), first=first)


def test_several_right_options():
    row = Row(LINES, "A, C")
    assert [choice(text, row) for text in (r"\boxed{AC}", r"\boxed{C and A}", r"\boxed{A}", r"\boxed{ABC}")] == [
        1,
        1,
        0,
        0,
    ]


def test_a_problem_that_only_looks_as_if_it_had_options():
    row = Row("Is A. Smith older than B? Yes or no", "B")
    assert choice("B", row) == 1 and choice("Answer: Smith older than B? Yes or no", row) == 0


def test_options_that_are_names_of_lines():
    row = Row("Which one?", "AC", columns={"options": ["AB", "AC", "BC"]})
    assert [choice(rf"\boxed{{{text}}}", row) for text in ("AC", "B", "BC", "A, C", "AB")] == [1, 1, 0, 0, 0]
