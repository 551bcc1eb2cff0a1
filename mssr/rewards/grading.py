"""Grades the responses of a batch while others are still generated."""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mssr.batch import GradedRollouts, Prompt, Rollouts
from mssr.rewards.reward import Reward, RewardFunction
from mssr.rollout.base import Response


class Grader:
    """Decodes and grades in one thread, which mostly waits for the process of the symbolic check.

    step_timeout_s: time for all symbolic checks of a step.
    """

    def __init__(self, reward: RewardFunction, tokenizer: PreTrainedTokenizerBase, *, step_timeout_s: float) -> None:
        self._reward = reward
        self._step_timeout_s = step_timeout_s
        self._tokenizer = tokenizer
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grader")

    def begin(self, prompts: Sequence[Prompt], spent_s: float = 0.0) -> "Grading":
        """Start to grade a batch. spent_s: grading time of the step's earlier batches."""
        return Grading(self, prompts, self._step_timeout_s - spent_s)

    def submit(self, prompt: Prompt, tokens: Tensor, grading: "Grading") -> Future:
        """Return a future of (reward of the response, its text). tokens: [R] int64. grading: counts time and timeouts."""
        return self._thread.submit(self._grade, tokens.tolist(), prompt.answer, grading)

    @property
    def timeouts(self) -> int:
        """Symbolic checks so far that were killed or left out."""
        return self._reward.timeouts

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._reward.close()

    def _grade(self, tokens: list[int], answer: str, grading: "Grading") -> tuple[Reward, str]:
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        started, timeouts = time.perf_counter(), self._reward.timeouts
        found = self._reward(text, answer, grading.left_s)
        grading.seconds += time.perf_counter() - started
        grading.timeouts += self._reward.timeouts - timeouts
        return found, text


class Grading:
    """Grades one batch. Called with (row, response) as responses complete: `on_response` of `RolloutEngine.generate`.

    seconds: grading time so far, beside generation or not. timeouts: symbolic checks that were killed or left out.
    """

    def __init__(self, grader: Grader, prompts: Sequence[Prompt], budget_s: float) -> None:
        self._grader = grader
        self._prompts = prompts
        self._budget_s = budget_s
        self._jobs: dict[int, Future] = {}
        self.seconds = 0.0
        self.timeouts = 0

    @property
    def left_s(self) -> float:
        return max(0.0, self._budget_s - self.seconds)

    def __call__(self, row: int, response: Response) -> None:
        self._jobs[row] = self._grader.submit(self._prompts[row], response.tokens, self)

    def finish(self, rollouts: Rollouts) -> GradedRollouts:
        """Return the rollouts with their rewards; what was not graded before is graded now."""
        for row, prompt in enumerate(self._prompts):
            if row not in self._jobs:
                self._jobs[row] = self._grader.submit(prompt, rollouts.response(row), self)
        graded = [self._jobs[row].result() for row in range(len(rollouts))]
        return GradedRollouts(
            **vars(rollouts),
            reward=torch.tensor([found.reward for found, _ in graded]),
            correct=torch.tensor([found.correct for found, _ in graded]),
            masked=torch.zeros(len(rollouts), dtype=torch.bool),
            texts=tuple(text for _, text in graded),
        )


def settle_truncated(rollouts: GradedRollouts, rule: Literal["graded", "masked", "failed"]) -> GradedRollouts:
    """Apply `rollout.truncated` to the responses that the token limit cut.

    graded: nothing changes. masked: the tracker sees the reward, the loss leaves the response out. failed: reward 0.
    """
    if rule == "masked":
        return replace(rollouts, masked=rollouts.truncated)
    if rule == "failed":
        return replace(rollouts, reward=rollouts.reward.masked_fill(rollouts.truncated, 0.0))
    return rollouts
