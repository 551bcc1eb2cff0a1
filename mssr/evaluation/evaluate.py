"""Measures accuracy on held-out problems."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mssr.batch import GradedRollouts, Rollouts
from mssr.config.schema import EvalConfig
from mssr.data.dataset import ProblemDataset
from mssr.distributed import World
from mssr.rewards.grading import part_means
from mssr.rollout.base import RolloutEngine, noise_streams

Judge = Callable[[Rollouts], GradedRollouts]
_ROWS_AT_ONCE = 512  # problems whose images are in memory together


@dataclass(frozen=True)
class Evaluation:
    """accuracy: mean success of the responses with a grade, one per problem; NaN if there are none.

    response_tokens: mean. truncated: fraction cut by the token limit. parts: mean of each part of the reward.
    """

    accuracy: float
    problems: int
    response_tokens: float
    truncated: float
    parts: dict[str, float]


def evaluate(
    problems: ProblemDataset,
    rollout: RolloutEngine,
    judge: Judge,
    world: World,
    config: EvalConfig,
    *,
    seed: int,
    advance: Callable[[int, int], None] = lambda by, total: None,
) -> Evaluation:
    """Answer every problem once at `config.temperature`; each rank answers a part.

    advance: called with the responses completed since its last call, over all ranks, and the number of problems.
    """
    count = min(len(problems), config.max_problems or len(problems))
    mine = range(world.rank, count, world.size)
    totals, parts = torch.zeros(4, dtype=torch.float64), []
    # The same number of calls on every rank: ranks that share a sampler call it together.
    for start in range(0, -(-count // world.size), _ROWS_AT_ONCE):
        rows = list(mine[start : start + _ROWS_AT_ONCE])
        streams = noise_streams(seed, "eval", 0, rows)
        answered = rollout.generate(
            problems.load(rows), streams, config.temperature, on_response=lambda *_: advance(world.size, count)
        )
        graded = judge(answered)
        successes = graded.correct[graded.graded]
        totals += torch.tensor([successes.sum(), len(successes), graded.mask.sum(), graded.truncated.sum()])
        parts += graded.parts
    correct, with_grade, tokens, truncated = world.sum(totals).tolist()
    accuracy = correct / with_grade if with_grade else math.nan
    return Evaluation(accuracy, count, tokens / count, truncated / count, part_means(parts, world))
