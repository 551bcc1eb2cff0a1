"""Measures accuracy on held-out problems: one response each, or the mean over several."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mssr.config.schema import EvalConfig
from mssr.data.dataset import ProblemDataset
from mssr.distributed import World
from mssr.rewards.grading import Grader, part_means
from mssr.rollout.base import RolloutEngine, noise_streams

_ROWS_AT_ONCE = 512  # responses whose images are in memory together


@dataclass(frozen=True)
class Evaluation:
    """accuracy: mean success of the responses with a grade, `samples` for each problem; NaN if there are none.

    response_tokens: mean. truncated: fraction cut by the token limit. parts: mean of each part of the reward.
    """

    accuracy: float
    problems: int
    samples: int
    response_tokens: float
    truncated: float
    parts: dict[str, float]


def evaluate(
    problems: ProblemDataset,
    rollout: RolloutEngine,
    grader: Grader,
    world: World,
    config: EvalConfig,
    *,
    seed: int,
    advance: Callable[[int, int], None] = lambda by, total: None,
) -> Evaluation:
    """Answer every problem `config.samples` times; each rank answers a part.

    advance: called with the responses completed since its last call, over all ranks, and the number of all.
    """
    count = min(len(problems), config.max_problems or len(problems))
    total = count * config.samples
    visits = [divmod(visit, config.samples) for visit in range(world.rank, total, world.size)]  # problem, its sample
    totals, parts = torch.zeros(4, dtype=torch.float64), []
    # The same number of calls on every rank: ranks that share a sampler call it together.
    for start in range(0, -(-total // world.size), _ROWS_AT_ONCE):
        chosen = visits[start : start + _ROWS_AT_ONCE]
        prompts = problems.load([row for row, _ in chosen])
        grading = grader.begin(prompts, lambda: advance(world.size, total))
        answered = rollout.generate(
            prompts,
            [noise_streams(seed, "eval", sample, [row])[0] for row, sample in chosen],
            config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            on_response=grading,
        )
        graded = grading.finish(answered)
        successes = graded.correct[graded.graded]
        totals += torch.tensor([successes.sum(), len(successes), graded.mask.sum(), graded.truncated.sum()])
        parts += graded.parts
    correct, with_grade, tokens, truncated = world.sum(totals).tolist()
    accuracy = correct / with_grade if with_grade else math.nan
    return Evaluation(accuracy, count, config.samples, tokens / total, truncated / total, part_means(parts, world))
