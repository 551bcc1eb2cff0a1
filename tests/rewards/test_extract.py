"""Extracting the boxed answer, and checking the format."""

import pytest

from mssr.rewards.extract import last_boxed, well_formed


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{10}", "10"),
        (r"\boxed{1} no, \boxed{ 2 }.", "2"),
        (r"\boxed{\frac{1}{2}} }", r"\frac{1}{2}"),
        (r"\boxed {3}", "3"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{}", ""),
        ("\\boxed{a\nb}", "a\nb"),
        ("10", None),
        ("", None),
        (r"\fbox{10}", None),
        (r"\boxed 5", None),
        (r"\boxed{10", None),
        (r"\boxed{1} and \boxed{\frac{1}{2}", None),
        (r"\boxed{1\}", None),
        ("\\boxed{1\\", None),
    ],
)
def test_last_boxed(text, answer):
    assert last_boxed(text) == answer


@pytest.mark.parametrize(
    ("text", "formed"),
    [
        (r"<think>3 7</think>\boxed{10}", True),
        ("\n <think>3\n7</think> It is \\boxed{10}.", True),
        (r"<think>\boxed{3}?</think>\boxed{10}", True),
        (r"Well <think>3 7</think>\boxed{10}", False),
        (r"<think>3 7\boxed{10}", False),
        (r"3 7</think>\boxed{10}", False),
        (r"</think>3 7<think>\boxed{10}", False),
        (r"<think>3</think><think>7</think>\boxed{10}", False),
        (r"<think>\boxed{10}</think>", False),
        (r"<think>3 7</think>10", False),
        (r"<think>3 7</think>\boxed{10} \boxed{10}", False),
        (r"<think>3 7</think>\boxed{10", False),
        (r"<think>3 7</think>\boxed{ }", False),
        (r"\boxed{10}", False),
        ("", False),
    ],
)
def test_well_formed(text, formed):
    assert well_formed(text) is formed
