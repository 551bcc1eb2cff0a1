"""Comparing answers as mathematics, and what is done without the library, which takes long to import."""

import subprocess
import sys
from pathlib import Path

import pytest

from mssr.rewards.builtin.math import math
from mssr.rewards.mathematics import equal as module
from mssr.rewards.mathematics.equal import equal
from mssr.rewards.row import Row

ROOT = Path(module.__file__).parents[3]


@pytest.mark.parametrize(
    ("predicted", "gold", "same"),
    [
        (r"\sqrt{8}", r"2\sqrt{2}", True),
        ("(x-1)(x+1)", "x^2-1", True),
        ("x+1", "x+2", False),
        ("R/r", "1", False),
        ("1.414214", r"\sqrt{2}", True),
        (r"\int_0^1 e^{-x^2} dx", "0.746824", True),
        ("π" * 5, "3", False),
        (r"\frac{1}{", "3", False),
    ],
)
def test_mathematics(predicted, gold, same):
    assert equal(predicted, gold) is same


@pytest.mark.parametrize(
    ("predicted", "gold", "same"),
    [
        (" 10 ", "10", True),
        ("10", "11", False),
        ("10.0", "10", True),
        ("+7", "07", True),
        ("-3", "3", False),
        ("1/2", ".5", True),
        ("2/4", "1/2", True),
        ("0.33", "1/3", False),
        ("0.3333333", "1/3", True),
        (r"\frac{1}{2}", "0.5", True),
        ("x=3", "3", True),
        (r"\text{A}", "A", True),
        ("1,000", "1000", True),
        ("30^\\circ", "30", True),
        ("felt", "left", False),
        ("1, 2, 3", "3", False),
        ("}{", "3", False),
        ("\\", "3", False),
        ("\ud800", "3", False),
        ("anything at all", "anything at all", True),
        ("", "", True),
        ("", "3", False),
        ("3", "", False),
        ("9" * 2000, "3", False),
        ("2+" * 1000 + "2", "2002", False),
    ],
)
def test_no_library_for_plain_answers(predicted, gold, same, monkeypatch):
    monkeypatch.setattr(module, "_library", None)
    module._compared.cache_clear()
    assert equal(predicted, gold) is same


def test_a_pair_that_comes_again_is_not_compared_again(monkeypatch):
    assert not equal(r"\sqrt{50}", r"5\sqrt{3}")
    monkeypatch.setattr(module, "_library", None)
    assert not equal(r"\sqrt{50}", r"5\sqrt{3}")


def test_the_library_is_imported_by_the_first_pair_that_needs_it():
    code = r"""
import sys
from mssr.rewards.builtin.math import math
from mssr.rewards.row import Row
assert math(r"\boxed{10.0}", Row("?", "10")) == 1
assert not {"torch", "transformers", "pydantic", "sympy"} & set(sys.modules)
assert math(r"\boxed{\sqrt4}", Row("?", "2")) == 1
assert "sympy" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        (r"<think>3 7</think>\boxed{10}", 1),
        (r"\boxed{10.0}", 1),
        (r"<think>3 7</think>\boxed{4}", 0),
        ("<think>3 7</think>10", 0),  # the right number, but no box
        (r"\boxed{10} or \boxed{4}", 0),  # the last box counts
        (r"\boxed{10} or \boxed{10", 0),
        (r"\boxed{}", 0),
        ("", 0),
    ],
)
def test_the_last_box_counts(response, reward):
    found = math(response, Row("?", "10"))
    assert found == reward and isinstance(found, float)
