"""Comparing answers in the real worker process: right results, a time limit, no process left behind."""

import os
import select
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from mssr.errors import UserError
from mssr.rewards import symbolic
from mssr.rewards.symbolic import SymbolicChecker

HANGS = "9^{9^{9^{9}}}"
ROOT = Path(symbolic.__file__).parents[2]


@pytest.fixture(scope="module")
def checker():
    with closing(SymbolicChecker(timeout_s=20.0)) as shared:
        yield shared


@pytest.mark.parametrize(
    ("predicted", "gold", "equal"),
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
def test_mathematics(checker, predicted, gold, equal):
    assert checker.equal(predicted, gold) is equal


@pytest.mark.parametrize(
    ("predicted", "gold", "equal"),
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
    ],
)
def test_no_worker_for_plain_answers(predicted, gold, equal, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    assert SymbolicChecker(timeout_s=1.0).equal(predicted, gold) is equal


def test_a_comparison_that_hangs_is_killed_and_the_next_one_works():
    with closing(SymbolicChecker(timeout_s=1.0)) as checker:
        assert checker.equal(r"\sqrt{4}", "2")
        assert not checker.equal(HANGS, "5")
        assert checker.timeouts == 1
        assert not checker.equal(HANGS, "5") and checker.timeouts == 1  # remembered, not waited for again
        checker.timeout_s = 20.0
        assert checker.equal(r"\sqrt{9}", "3")


def test_all_parts_of_an_answer_share_its_time():
    with closing(SymbolicChecker(timeout_s=1.0)) as checker:
        assert not checker.equal(rf"\{{{HANGS}, 2^{{{HANGS}}}\}}", r"\{x, y\}") and checker.timeouts == 1


def test_a_comparison_for_which_no_time_is_left_is_made_later():
    with closing(SymbolicChecker(timeout_s=20.0)) as checker:
        assert not checker.equal(r"\sqrt{4}", "2", within_s=0.0) and checker.timeouts == 1
        assert checker.equal("10.0", "10", within_s=0.0)  # needs no library
        assert checker.equal(r"\sqrt{4}", "2") and checker.timeouts == 1


def children() -> set[int]:
    """Return the direct children of this process, zombies included."""
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


def test_closing_leaves_no_process_and_no_pipe():
    before, files = children(), len(os.listdir("/proc/self/fd"))
    with closing(SymbolicChecker(timeout_s=0.5)) as checker:
        assert not checker.equal(HANGS, "5")
        checker.timeout_s = 20.0
        assert checker.equal(r"\sqrt{4}", "2")
        assert len(children() - before) == 1
    assert children() == before and len(os.listdir("/proc/self/fd")) == files
    assert checker.equal(r"\sqrt{9}", "3")  # usable again
    checker.close()
    checker.close()
    assert children() == before


def test_a_worker_killed_from_outside_is_replaced():
    before = children()
    with closing(SymbolicChecker(timeout_s=20.0)) as checker:
        assert checker.equal(r"\sqrt{4}", "2")
        (worker,) = children() - before
        os.kill(worker, signal.SIGKILL)
        assert checker.equal(r"\sqrt{9}", "3")
        assert checker.timeouts == 0


def test_a_worker_that_keeps_dying_is_an_error(tmp_path, monkeypatch):
    dies = tmp_path / "worker.py"
    dies.write_text("print('{\"ready\": true}', flush=True)\ninput()\nraise SystemExit(3)\n")
    monkeypatch.setattr(symbolic, "_WORKER", dies)
    before = children()
    with pytest.raises(UserError, match=r"^the symbolic check died twice \(exit code 3\) comparing 'x' with 'y'; "):
        SymbolicChecker(timeout_s=20.0).equal("x", "y")
    assert children() == before


def test_a_worker_that_does_not_start_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(symbolic, "_WORKER", tmp_path / "gone.py")
    with pytest.raises(UserError, match="^the symbolic check does not start .* is math-verify installed"):
        SymbolicChecker(timeout_s=20.0).equal("x", "y")


TRAINER = r"""
import os, sys
from mssr.config.reward_keys import RewardConfig
from mssr.rewards.reward import RewardFunction
rewards = RewardFunction(RewardConfig(timeout_s=1000.0))
assert rewards(r"\boxed{\sqrt4}", "2").correct == 1.0
assert not {"torch", "transformers", "sympy"} & set(sys.modules)
print(rewards.checker._worker.pid, flush=True)
os.kill(os.getpid(), 9)
"""


def test_the_worker_ends_with_a_killed_trainer():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    trainer = subprocess.run([sys.executable, "-c", TRAINER], stdout=subprocess.PIPE, env=environment, timeout=60)
    assert trainer.returncode == -signal.SIGKILL
    try:
        worker = os.pidfd_open(int(trainer.stdout))
    except ProcessLookupError:
        return  # gone already
    ended = select.poll()
    ended.register(worker, select.POLLIN)
    assert ended.poll(20_000)
    os.close(worker)


def test_the_alarm_ends_a_worker_nobody_is_left_to_kill():
    worker = subprocess.Popen(
        [sys.executable, "-P", str(ROOT / "mssr/rewards/worker.py"), "1"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert worker.stdout.readline() == b'{"ready": true}\n'
    worker.stdin.write(b'{"kind": "value", "predicted": "%s", "gold": "5"}\n' % HANGS.encode())
    worker.stdin.close()
    assert worker.wait(timeout=20) == -signal.SIGALRM
    worker.stdout.close()
