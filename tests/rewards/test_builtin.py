"""Built-in rewards of one answer, by tables worked out by hand. Multiple choice, boxes and the judge: files of their own."""

import importlib
import itertools
import time

import pytest

from mssr.errors import UserError
from mssr.rewards.builtin.count import count
from mssr.rewards.builtin.exact import exact
from mssr.rewards.builtin.format import format
from mssr.rewards.builtin.math import math
from mssr.rewards.builtin.number import number
from mssr.rewards.builtin.overlong import overlong
from mssr.rewards.row import Row


@pytest.mark.parametrize(
    ("response", "pattern", "reward"),
    [
        (r"<think>3 7</think>\boxed{10}", None, 1),
        (r"\boxed{10}", None, 0),
        ("", None, 0),
        ("<answer>5</answer>", r"<answer>\d+</answer>", 1),
        ("<answer>\n5\n</answer>", "<answer>.*</answer>", 1),  # . matches line ends
        ("<answer>5</answer> ", r"<answer>\d+</answer>", 0),  # the whole response
        ("so <answer>5</answer>", r"<answer>\d+</answer>", 0),
        ("", "", 1),
    ],
)
def test_format(response, pattern, reward):
    assert format(response, Row("?", ""), pattern=pattern) == reward


@pytest.mark.parametrize(
    ("tokens", "penalty"), [(0, 0), (80, 0), (81, -0.05), (90, -0.5), (99, -0.95), (100, -1), (101, -1)]
)
def test_overlong(tokens, penalty):
    """M = 100, buffer = 20: free up to 80 tokens."""
    assert overlong("", Row("?", "", tokens=tokens, max_tokens=100), buffer=20) == pytest.approx(penalty)


def test_a_buffer_of_all_tokens_and_one_of_more():
    assert overlong("", Row("?", "", tokens=5, max_tokens=20), buffer=20) == -0.25
    with pytest.raises(UserError, match=r"^buffer: 21 is more than the 20 tokens of rollout.max_response_tokens; "):
        overlong("", Row("?", "", tokens=5, max_tokens=20), buffer=21)


@pytest.mark.parametrize(
    ("response", "answer", "rule", "reward"),
    [
        ("Paris", "paris", "text", 1),
        ("So it is in France.\nThe answer is **Paris**.", "Paris", "text", 1),
        (r"\boxed{\text{New  York}}", "new york", "text", 1),
        ("<think>London?</think>\nParis\n", "Paris", "text", 1),
        ("<think>Paris", "Paris", "text", 0),  # thinking has not ended
        (r"Paris \boxed{Pari", "Paris", "text", 0),  # cut
        ("a dog", "The dog", "text", 1),
        ("“Ｔｈｅ dog”!", "dog", "text", 1),
        ("dog the", "dog", "text", 0),
        ("straße", "STRASSE", "text", 1),
        ("3.5", "35", "text", 0),
        ("U.S.", "U.S", "text", 1),
        ("don't", "dont", "text", 0),
        ("Paris or London", "Paris", "text", 0),
        ("paris", "Paris", "case", 0),
        ("Paris.", "Paris", "case", 1),
        ("the Paris", "Paris", "case", 0),
        ("The U.S. and the UK", "us and uk", "squad", 1),
        ("dont", "don't", "squad", 1),
        ("", "Paris", "text", 0),
        ("...", "!", "text", 0),
    ],
)
def test_exact(response, answer, rule, reward):
    assert exact(response, Row("?", answer), rule=rule) == reward


@pytest.mark.parametrize("answers", [["New York", "NYC"], {"text": ["New York", "NYC"], "answer_start": [1, 2]}])
def test_any_of_several_answers_is_right(answers):
    row = Row("?", "", columns={"answers": answers})
    assert [exact(text, row) for text in ("nyc", "New York", "York")] == [1, 1, 0]
    assert exact("The Big Apple", Row("?", "big apple", columns={"answers": answers})) == 1


@pytest.mark.parametrize(
    ("response", "answer", "options", "reward"),
    [
        ("5", "5", {}, 1),
        ("Answer: 5.0", "5", {}, 1),
        ("#### 1,234", "1234", {}, 1),
        (r"\boxed{\frac{1}{2}}", "0.5", {}, 1),
        (r"\boxed{-3}", "3", {}, 0),
        ("−3", "-3", {}, 1),  # a minus sign of Unicode
        ("five", "5", {}, 1),
        ("1e3", "1000", {}, 1),
        ("５", "5", {}, 1),
        ("٥", "5", {}, 0),  # other digits of Unicode
        ("There are 5", "5", {}, 0),  # a sentence is no number
        ("5 or 6", "5", {}, 0),
        ("104.9", "100", {}, 0),
        ("104.9", "100", {"tolerance": 0.05}, 1),
        ("105", "100", {"tolerance": 0.05}, 1),  # exactly 5 %
        ("95", "100", {"tolerance": 0.05}, 1),
        ("105.01", "100", {"tolerance": 0.05}, 0),
        ("130", "100", {"tolerance": 0.3}, 1),  # as a float, 0.3 is a little less
        ("-105", "-100", {"tolerance": 0.05}, 1),
        ("0.01", "0", {"tolerance": 0.05}, 0),
        ("0", "0", {"tolerance": 0.05}, 1),
        ("50%", "0.5", {}, 1),
        ("50%", "50", {}, 0),
        ("50%", "50", {"units": True}, 1),
        ("5 kg", "5", {}, 0),
        ("5 kg", "5", {"units": True}, 1),
        ("$5", "5", {"units": True}, 1),
        ("5", "5 apples", {"units": True}, 1),
        ("2 million", "2000000", {"units": True}, 1),
        ("yes", "Yes", {"tolerance": 0.05}, 1),  # no number: as text
        ("No", "Yes", {"tolerance": 0.05}, 0),
        ("5", "Yes", {}, 0),
        ("9" * 300, "9" * 300, {}, 1),  # too long to be a number
        ("", "5", {}, 0),
        (r"\boxed{}", "5", {}, 0),
        ("1e999999999", "5", {"tolerance": 0.05}, 0),
    ],
)
def test_number(response, answer, options, reward):
    assert number(response, Row("?", answer), **options) == reward


@pytest.mark.parametrize(
    ("response", "answer", "partial", "reward"),
    [
        ("5", "5", 0, 1),
        ("There are 5 red squares.", "5", 0, 1),
        ("There are 5 red and 2 blue squares.", "5", 0, 0),
        ("I see 2 and 3.\nAnswer: 5 squares", "5", 0, 1),
        ("<think>2 or 3</think> three", "3", 0, 1),
        ("5.0", "5", 0, 1),
        ("5.5", "5", 0, 0),
        ("1,000", "1000", 0, 1),
        ("-5", "5", 0, 0),
        ("5 5", "5", 0, 1),
        ("x5", "5", 0, 0),
        ("none", "0", 0, 0),
        ("zero", "0", 0, 1),
        ("6", "5", 0, 0),
        ("6", "5", 1, 0.5),
        ("4", "5", 3, 0.75),
        ("8", "5", 3, 0.25),
        ("9", "5", 3, 0),
        ("5", "5 squares", 0, 1),
        ("", "5", 3, 0),
        ("5 " * 1000, "5", 0, 0),  # too long
    ],
)
def test_count(response, answer, partial, reward):
    assert count(response, Row("?", answer), partial=partial) == reward


@pytest.mark.parametrize("answer", ["some", "2 of 3", "-1", "2.5"])
def test_an_answer_that_is_no_count_is_an_error(answer):
    with pytest.raises(UserError, match=f"^the answer '{answer}' is not a count: "):
        count("2", Row("?", answer))


@pytest.mark.parametrize("name", ["math", "exact", "number", "count", "choice", "iou"])
def test_a_row_without_an_answer_is_an_error(name):
    function = getattr(importlib.import_module(f"mssr.rewards.builtin.{name}"), name)
    with pytest.raises(UserError, match="^the row has no answer to compare with; fill in its column `answer`"):
        function(r"\boxed{5}", Row("?", " "))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("format", {"pattern": "(a"}, r"pattern: '\(a' is not a regular expression: missing \), .*"),
        ("format", {"pattern": 5}, "pattern: 5 is not a regular expression: .*"),
        ("overlong", {"buffer": 0}, "buffer: must be an integer of at least 1, got 0"),
        ("overlong", {"buffer": 1.5}, "buffer: must be an integer of at least 1, got 1.5"),
        ("exact", {"rule": "SQuAD"}, "rule: must be one of text, case, squad, got 'SQuAD'"),
        ("number", {"tolerance": -0.1}, "tolerance: must be a number of at least 0, got -0.1"),
        ("number", {"tolerance": "5%"}, "tolerance: must be a number of at least 0, got '5%'"),
        ("number", {"tolerance": True}, "tolerance: must be a number of at least 0, got True"),
        ("number", {"units": "no"}, "units: must be true or false, got 'no'"),
        ("count", {"partial": -1}, "partial: must be an integer of at least 0, got -1"),
        ("choice", {"first": 2}, "first: must be an integer from 0 to 1, got 2"),
        ("iou", {"threshold": 50}, "threshold: must be a number from 0 to 1, got 50"),
    ],
)
def test_a_wrong_option_is_refused_before_any_call(name, options, message):
    function = getattr(importlib.import_module(f"mssr.rewards.builtin.{name}"), name)
    with pytest.raises(UserError, match=f"^{message}$"):
        function.check(**options)


@pytest.mark.parametrize("name", ["format", "exact", "number", "count", "choice", "iou"])
def test_defaults_are_accepted(name):
    getattr(importlib.import_module(f"mssr.rewards.builtin.{name}"), name).check()


HUGE = 1_000_000  # characters
PIECES = [
    "x", " ", "\n", "5 ", "5", "[", "[1,2,3,4]", "(1,2),", "[1,2,3,", "\\boxed{", "\\boxed ", "<answer>", "</answer>",
    "<think>", "</think>", "Answer: ", "answer", "answer\t", "is **", "```", "```json\n", "\\text{", "**", "(B) ", "A. ",
    "A, ", "é", "\u0661", "#### ",
]  # fmt: skip


@pytest.mark.parametrize("function", [math, format, exact, number, count, "choice", "iou"])
def test_a_huge_response_takes_no_longer_than_its_length(function):
    """No pattern tries all ways to divide a text: that takes minutes for a megabyte, or for ever."""
    if isinstance(function, str):
        function = getattr(importlib.import_module(f"mssr.rewards.builtin.{function}"), function)
    row = Row("?", "[1,2,3,4]" if function.__name__ == "iou" else "5" if function.__name__ != "choice" else "B")
    for piece, end in zip(PIECES, itertools.cycle(["", " \\boxed{7}", "7", "\n7"])):
        text = (piece * (HUGE // len(piece) + 1))[: HUGE - len(end)] + end
        started = time.process_time()
        assert 0 <= function(text, row) <= 1
        assert time.process_time() - started < 1, (piece, end)
