"""Bounding boxes: intersection over union (IoU) with the right ones."""

import re

from mssr.errors import UserError
from mssr.rewards.extract import final, right_answer, stated
from mssr.rewards.option_checks import require_number
from mssr.rewards.row import Row

USES_IMAGES = False

Box = tuple[float, float, float, float]  # left, top, right, bottom

_ONE = r"\s{0,9}(-?\d{1,9}(?:\.\d{0,20})?)\s{0,9}"
_BOX = re.compile(
    rf"[\[(]{_ONE},{_ONE},{_ONE},{_ONE}[\])]|[\[(]{_ONE},{_ONE}[\])]\s{{0,9}},?\s{{0,9}}[\[(]{_ONE},{_ONE}[\])]",
    re.ASCII,
)
_FENCE = re.compile(r"```(?:json)?")
MAX_BOXES = 300  # of a response; more are no answer


def iou(response: str, row: Row, *, threshold: float | None = None) -> float:
    """Return the IoU of the response's box with the right one, 0 without a box.

    Several boxes are paired so that the sum of their IoUs is largest, and the sum is divided by the larger number of boxes: a
    box that is missing, or one too many, counts as 0.
    threshold: return 1 if all boxes are found, none too many, each with at least this IoU, else 0.
    """
    right, found = _boxes(right_answer(row)), _boxes(_answer(response))
    if not right:
        raise UserError(f"the answer {row.answer[:80]!r} is not a box; write [x1, y1, x2, y2], or a list of these")
    if not found or len(found) > MAX_BOXES:
        return 0.0
    overlaps = [[_overlap(one, other) for other in right] for one in found]
    if threshold is None:
        return _paired(overlaps) / max(len(found), len(right))
    reached = [[float(each >= threshold) for each in line] for line in overlaps]
    return float(_paired(reached) == max(len(found), len(right)))


def _answer(response: str) -> str:
    """Return what the response states as its answer, else its last block of code, else all of it but the thinking."""
    if (said := stated(response)) is not None:
        return said
    text = final(response)
    blocks = _FENCE.split(text)
    return blocks[-2] if len(blocks) > 2 else text


def _boxes(text: str) -> list[Box]:
    """Return the boxes of a text: [x1, y1, x2, y2] or (x1, y1), (x2, y2). The corners may be in any order."""
    boxes = []
    for found in _BOX.finditer(text):
        x1, y1, x2, y2 = map(float, found.groups()[:4] if found[1] else found.groups()[4:])
        boxes.append((min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)))
    return boxes


def _overlap(one: Box, other: Box) -> float:
    width, height = (min(one[axis + 2], other[axis + 2]) - max(one[axis], other[axis]) for axis in (0, 1))
    both = max(0.0, width) * max(0.0, height)
    either = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)) - both
    return both / either if either > 0 else 0.0


def _paired(values: list[list[float]]) -> float:
    """Return the largest sum of values when every row and every column is used at most once."""
    if len(values) == 1:
        return max(values[0])
    from scipy.optimize import linear_sum_assignment  # only rewards with several boxes pay for the import

    return sum(values[row][column] for row, column in zip(*linear_sum_assignment(values, maximize=True)))


def _check(*, threshold: float | None = None) -> None:
    if threshold is not None:
        require_number("threshold", threshold, at_least=0, at_most=1)


iou.check = _check
