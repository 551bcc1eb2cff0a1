"""Metrics of a training step."""

import math

import torch
from torch import Tensor

from mssr.algorithms.advantages import Outcomes, zero_variance
from mssr.batch import GradedRollouts
from mssr.distributed import World
from mssr.observe.metrics import Metric
from mssr.policy.engine import UpdateStats
from mssr.rollout.gap import LogpGap
from mssr.stopwatch import Stopwatch

_NO_PHASES = {"perf/step_seconds", "perf/rollout_seconds", "perf/grading_seconds"}
BINS = 10  # of the value tracker's predictions


def step_metrics(
    rollouts: GradedRollouts, updates: list[UpdateStats], gap: LogpGap, clock: Stopwatch, world: World
) -> dict[str, float]:
    """Means over the step's responses, tokens or updates on all ranks; the same on every rank except for timings.

    With dynamic sampling they cover only the responses that were kept: train/reward is then not the policy's accuracy.
    train/*: over the responses with a grade; train/correct is the mean success.

    policy/*: over response tokens; entropy is the exact one, entropy_proxy the sampled token's -p log p.
    rollout/*: over responses; train/grad_norm: over the updates, before clipping.
    perf/tokens_per_second: prompt and response tokens of all ranks per second of the whole step.
    """
    prompt_tokens = sum(len(prompt.token_ids) for prompt in rollouts.prompts)
    sums = torch.stack([
        torch.tensor(float(len(rollouts))), rollouts.graded.sum(), rollouts.reward[rollouts.graded].sum(),
        rollouts.correct[rollouts.graded].sum(), rollouts.mask.sum(), rollouts.truncated.sum(),
        torch.tensor(float(prompt_tokens)), sampled_token_entropy(rollouts.logp)[rollouts.mask].sum(),
    ])  # fmt: skip
    count, graded, reward, correct, tokens, truncated, prompts, proxy = world.sum(sums.double()).tolist()
    metrics = {
        "train/reward": reward / graded if graded else math.nan,
        "train/correct": correct / graded if graded else math.nan,
        "train/grad_norm": _mean([update.grad_norm for update in updates]),
        "train/lr": updates[-1].lr,
        "rollout/response_tokens": tokens / count,
        "rollout/truncated": truncated / count,
        "rollout/logp_gap_mean": gap.mean,
        "rollout/logp_gap_p99": gap.p99,
        "rollout/logp_gap_max": gap.max,
    }
    metrics["policy/entropy_proxy"] = proxy / tokens
    metrics |= {f"policy/{name}": _mean([update.metrics[name] for update in updates]) for name in updates[0].metrics}
    metrics |= {f"perf/{phase}_seconds": spent for phase, spent in clock.seconds.items()}
    most = world.max(torch.tensor(list(clock.memory.values()), dtype=torch.float64)).tolist()
    metrics |= dict(zip(clock.memory, most))
    metrics |= {"perf/step_seconds": clock.total, "perf/tokens_per_second": (tokens + prompts) / clock.total}
    return metrics


class SlowGrading:
    """Says once that grading delays the steps."""

    def __init__(self) -> None:
        self._said = False
        self._slow_steps = 0  # in a row

    def warning(self, metrics: dict[str, Metric], slowest: str) -> str | None:
        """Return a line if the wait for grading was the longest phase of two steps in a row: one may have started workers.

        slowest: label of the function that took the most time.
        """
        phases = {
            name: value
            for name, value in metrics.items()
            if name.startswith("perf/") and name.endswith("_seconds") and name not in _NO_PHASES
        }
        waited = phases.get("perf/reward_seconds", 0.0)
        self._slow_steps = self._slow_steps + 1 if waited > 0 and waited == max(phases.values()) else 0
        if self._said or self._slow_steps < 2:
            return None
        self._said = True
        return (
            f"grading was the slowest phase ({waited:.3g} s after generation), most of it in the reward function {slowest}: "
            "more reward.workers or an async function do more at once; reward.timeout_s limits a call, "
            "reward.step_timeout_s the wait (said once)"
        )


def outcome_metrics(outcomes: Outcomes) -> dict[str, Metric]:
    """Quality of the baselines; with groups, the share of groups whose responses all get the same reward.

    tracker/baseline_mean; tracker/brier and tracker/bins: see `calibration`. rollout/zero_variance: share of responses
    in groups whose responses all get the same reward.
    """
    metrics = {}
    if outcomes.value is not None:
        metrics["tracker/baseline_mean"] = float(outcomes.baseline.double().mean())
        metrics |= calibration(outcomes.value[outcomes.graded], outcomes.success[outcomes.graded])
    if outcomes.group > 1:
        equal = zero_variance(outcomes.reward, outcomes.graded, outcomes.group)
        metrics["rollout/zero_variance"] = float(equal.double().mean())
    return metrics


def calibration(value: Tensor, success: Tensor) -> dict[str, float | list[list[float]]]:
    """Return the metrics of one step.

    tracker/brier: mean of (v - r)^2, r the success; 0.25 for a tracker that always predicts 0.5 (successes 0 and 1).
    tracker/bins: for v in [0, .1), [.1, .2), ... [.9, 1], [count, sum of v, sum of r]; sums, so that steps can be added.

    value: [B] in [0, 1], v before the tracker saw these successes.
    success: [B] in [0, 1].
    """
    which = (BINS * value).long().clamp(max=BINS - 1)
    columns = torch.stack([torch.ones_like(value), value, success], 1).double()
    sums = torch.zeros(BINS, 3, dtype=torch.float64).index_add(0, which, columns)
    return {"tracker/brier": (value - success).double().square().mean().item(), "tracker/bins": sums.tolist()}


def sampled_token_entropy(logp: Tensor) -> Tensor:
    """Return -p log p of the sampled token, the authors' proxy for the entropy (code of arXiv 2512.18215).

    It is one term of the entropy's sum: at most 1/e = 0.368 (at p = 1/e), and 0 both for a very unlikely and for a certain
    token.

    logp: any shape, <= 0. -inf (p = 0) gives 0.
    """
    p = logp.exp()
    return (-p * logp).masked_fill(p == 0, 0.0)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
