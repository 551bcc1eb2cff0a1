"""Grading while a batch is generated, and the rules for truncated responses."""

import threading
from dataclasses import replace

import pytest
import torch

from mssr.batch import GradedRollouts, Prompt
from mssr.config.reward_keys import RewardConfig
from mssr.rewards.grading import Grader, settle_truncated
from mssr.rewards.reward import RewardFunction
from mssr.rollout.base import Response, collect

TEXTS = ["\\boxed{4}", "\\boxed{5}", "no box", "\\boxed{2+2}"]


class Letters:
    """A tokenizer whose tokens are characters."""

    def decode(self, tokens, skip_special_tokens):
        return "".join(map(chr, tokens))


def prompt(row):
    return Prompt(str(row), row, "2 + 2?", "4", None, torch.tensor([1]), None, None, ())


def response(text, truncated=False):
    return Response(torch.tensor(list(map(ord, text))), torch.zeros(len(text)), truncated, 7)


PROMPTS = [prompt(row) for row in range(4)]
BATCH = collect(PROMPTS, [response(text, truncated=row == 3) for row, text in enumerate(TEXTS)], pad=0)


@pytest.fixture
def grader():
    grader = Grader(RewardFunction(RewardConfig(format_weight=0.0, timeout_s=1.0)), Letters(), step_timeout_s=300.0)
    yield grader
    grader.close()


@pytest.mark.parametrize("told", [[], [2], [3, 1, 0, 2]])
def test_every_response_is_graded_whether_told_before_or_not(grader, told):
    grading = grader.begin(PROMPTS)
    for row in told:
        grading(row, response(TEXTS[row]))
    graded = grading.finish(BATCH)
    assert graded.reward.tolist() == graded.correct.tolist() == [1, 0, 0, 1]
    assert graded.texts == tuple(TEXTS) and not graded.masked.any()


def test_each_response_is_graded_by_its_own_prompts_answer(grader):
    """Two responses are passed out of order, the other two only at the end."""
    prompts = [replace(prompt(row), answer=answer) for row, answer in enumerate(["4", "5", "6", "9"])]
    grading = grader.begin(prompts)
    for row in (3, 1):
        grading(row, response(TEXTS[row]))
    assert grading.finish(BATCH).correct.tolist() == [1, 1, 0, 0]


def test_grading_goes_on_while_others_generate(grader):
    """The first response is graded before there is a second one."""
    graded = threading.Event()
    rewards = grader._reward

    class Telling:
        timeouts = 0

        def __call__(self, *arguments):
            result = rewards(*arguments)
            graded.set()
            return result

        def close(self):
            rewards.close()

    grader._reward = Telling()
    grading = grader.begin(PROMPTS)
    grading(0, response(TEXTS[0]))
    assert graded.wait(30)


def test_an_error_of_the_reward_is_raised(grader):
    def broken(*_):
        raise RuntimeError("the checker is gone")

    broken.close, broken.timeouts = grader._reward.close, 0
    grader._reward = broken
    with pytest.raises(RuntimeError, match="the checker is gone"):
        grader.begin(PROMPTS).finish(BATCH)


HANGS = "\\boxed{9^{9^{9^{9}}}}"


def test_time_and_timeouts_of_grading_are_counted(grader):
    grading = grader.begin(PROMPTS)
    assert grading.timeouts == 0 and grading.seconds == 0
    grading(0, response(HANGS))
    grading.finish(BATCH)
    assert grading.timeouts == 1 and grading.seconds >= 1.0


def test_grading_a_step_takes_no_longer_than_its_budget(grader):
    """The check that would need the library is left out, and counted; the others are made."""
    texts = ["\\boxed{\\sqrt{16}}", "\\boxed{5}", "no box", "\\boxed{4.0}"]
    batch = collect(PROMPTS, [response(text) for text in texts], pad=0)
    spent = grader.begin(PROMPTS, spent_s=300.0)
    assert spent.finish(batch).correct.tolist() == [0, 0, 0, 1] and spent.timeouts == 1
    assert grader.begin(PROMPTS).finish(batch).correct.tolist() == [1, 0, 0, 1]  # the next step has its own time


def test_an_empty_batch(grader):
    graded = grader.begin([]).finish(collect([], [], pad=0))
    assert graded.reward.shape == (0,) and graded.texts == ()


def settled(rule) -> GradedRollouts:
    reward, correct = torch.tensor([1.0, 0, 0.5, 1]), torch.tensor([1.0, 0, 0, 1])
    graded = GradedRollouts(
        **vars(BATCH), reward=reward, correct=correct, masked=torch.zeros(4, dtype=torch.bool), texts=tuple(TEXTS)
    )
    return settle_truncated(graded, rule)


def test_truncated_responses_are_graded_like_others():
    batch = settled("graded")
    assert batch.reward.tolist() == [1, 0, 0.5, 1] and not batch.masked.any()
    assert torch.equal(batch.loss_mask, batch.mask)


def test_truncated_responses_left_out_of_the_loss():
    batch = settled("masked")
    assert batch.reward.tolist() == [1, 0, 0.5, 1]  # the tracker still counts these rewards
    assert batch.masked.tolist() == [False, False, False, True]
    assert torch.equal(batch.loss_mask[:3], batch.mask[:3]) and not batch.loss_mask[3].any()


def test_truncated_responses_fail():
    batch = settled("failed")
    assert batch.reward.tolist() == [1, 0, 0.5, 0] and not batch.masked.any()
    assert batch.correct.tolist() == [1, 0, 0, 1]  # unchanged: whether the answer was right
