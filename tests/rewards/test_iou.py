"""Boxes: how a response writes them, and their intersection over union with the right ones."""

import pytest

from mssr.errors import UserError
from mssr.rewards.builtin.iou import iou
from mssr.rewards.row import Row

ANSWER = "[10, 10, 30, 30]"


@pytest.mark.parametrize(
    ("response", "value"),
    [
        ("[10, 10, 30, 30]", 1),
        ("[30, 30, 10, 10]", 1),  # corners in another order
        ("[10, 10, 30, 20]", 1 / 2),
        ("[20, 20, 40, 40]", 1 / 7),  # 100 of 400 + 400 - 100
        ("[0, 0, 40, 40]", 1 / 4),
        ("[30, 10, 50, 30]", 0),  # only the edge
        ("[10, 10, 10, 30]", 0),  # no area
        ("[-10, 10, 30, 30]", 1 / 2),
        ("[10.0, 10.0, 30.0, 20.0]", 1 / 2),
        (r"It is at \boxed{[10, 10, 30, 20]}.", 1 / 2),
        (r"\boxed{[0,0,1,1]} \boxed{[10,10,30,30]}", 1),
        (r"[10, 10, 30, 30] \boxed{none}", 0),
        (r"[10, 10, 30, 30] \boxed{[10, 10", 0),
        ("<box>(10,10),(30,20)</box>", 1 / 2),
        ("<|box_start|>(10,10),(30,20)<|box_end|>", 1 / 2),
        ("(10,10),(30,20)", 1 / 2),
        ("[[10, 10], [30, 20]]", 1 / 2),
        ('```json\n[{"bbox_2d": [10, 10, 30, 20], "label": "dog"}]\n```', 1 / 2),
        ('First ```json\n[1, 1, 2, 2]\n``` no:\n```\n{"bbox": [10, 10, 30, 20]}\n```', 1 / 2),
        ('<think>[0, 0, 5, 5]</think><answer>{"bbox": [10, 10, 30, 20]}</answer>', 1 / 2),
        ("<think>[10, 10, 30, 30]", 0),
        ("[10, 10, 30, 30] or [90, 90, 99, 99]", 1 / 2),  # one too many
        ("[10, 10, 30]", 0),
        ("[10, 10, 30, 30, 5]", 0),
        ("10, 10, 30, 30", 0),
        ("[1e1, 10, 30, 30]", 0),
        ("[nan, 10, 30, 30]", 0),
        ("[١٠, 10, 30, 30]", 0),
        ("", 0),
    ],
)
def test_one_box(response, value):
    assert iou(response, Row("?", ANSWER)) == pytest.approx(value)


@pytest.mark.parametrize(
    "answer", ["[10, 10, 30, 30]", "(10,10),(30,30)", "[[10, 10, 30, 30]]", '[{"bbox_2d": [10, 10, 30, 30]}]']
)
def test_ways_to_write_the_answer(answer):
    assert iou("[10, 10, 30, 20]", Row("?", answer)) == 0.5


TWO = "[[0, 0, 10, 10], [0, 10, 10, 20]]"


@pytest.mark.parametrize(
    ("response", "value", "found_at_half"),
    [
        ("[[0, 0, 10, 10], [0, 10, 10, 20]]", 1, 1),
        ("[[0, 10, 10, 20], [0, 0, 10, 10]]", 1, 1),  # in any order
        ("[[0, 0, 10, 10]]", 1 / 2, 0),  # one is missing
        ("[[0, 0, 10, 10], [0, 10, 10, 20], [50, 50, 60, 60]]", 2 / 3, 0),  # one too many
        ("[[0, 0, 10, 10], [0, 0, 10, 10]]", 1 / 2, 0),  # twice the same
        ("[[0, 0, 10, 5], [0, 10, 10, 20]]", 3 / 4, 1),
        # The first overlaps both by a third, the second only the first one: the best pairs are not the first ones found.
        ("[[0, 5, 10, 15], [0, 0, 10, 9]]", (1 / 3 + 9 / 10) / 2, 0),
        ("", 0, 0),
    ],
)
def test_several_boxes(response, value, found_at_half):
    assert iou(response, Row("?", TWO)) == pytest.approx(value)
    assert iou(response, Row("?", TWO), threshold=0.5) == found_at_half


def test_threshold():
    row = Row("?", ANSWER)
    assert [iou("[10, 10, 30, 20]", row, threshold=value) for value in (0.4, 0.5, 0.6)] == [1, 1, 0]


def test_more_boxes_than_can_be_meant_are_no_answer():
    row = Row("?", ANSWER)
    assert iou("[10, 10, 30, 30] " * 300, row) == pytest.approx(1 / 300)
    assert iou("[10, 10, 30, 30] " * 301, row) == 0


def test_an_answer_without_a_box_is_an_error():
    with pytest.raises(UserError, match="^the answer 'left' is not a box; write "):
        iou("[1, 2, 3, 4]", Row("?", "left"))
