"""The log-prob gap between rollout engine and trainer: one number that reveals stale weights, caches and wrong names."""

import math
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from mssr.distributed import World


@dataclass(frozen=True)
class LogpGap:
    """|trainer's log-prob - rollout engine's| of the sampled tokens on all ranks, in nats."""

    mean: float
    p99: float
    max: float

    def within(self, limit: float) -> bool:
        return self.mean <= limit  # False for NaN


def measure_gap(
    trainer_logp: Tensor, rollout_logp: Tensor, mask: Tensor, world: World, *, top_p: float = 1.0
) -> LogpGap:
    """Return the gap between two log-probs under the same weights; 0 without tokens. Tensors: [B, R].

    top_p: of the sampler, whose log-probs are of the tokens that it keeps. These have a probability in [top_p, 1], by
    which they are divided: only what is outside of that range counts.
    """
    difference = trainer_logp - rollout_logp
    explained = difference.clamp(math.log(top_p), 0.0)
    own = (difference - explained).abs()[mask].cpu()
    gap = torch.cat(world.gather(own)).double()
    if not len(gap):
        return LogpGap(0.0, 0.0, 0.0)
    if not gap.isfinite().all():
        return LogpGap(float("nan"), float("nan"), float("nan"))
    p99 = numpy.quantile(gap.numpy(), 0.99, method="inverted_cdf")  # torch.quantile takes at most 2^24 values
    return LogpGap(float(gap.mean()), float(p99), float(gap.max()))


def describe_large_gap(gap: LogpGap, limit: float) -> str:
    """Say why a step whose gap is over the limit (or NaN) is not trained on, and what to check."""
    return (
        f"rollout and trainer disagree by {gap.mean:.3g} nats per token on average (p99 {gap.p99:.3g}, "
        f"max {gap.max:.3g}; rollout.max_gap {limit:g}); check that weights and caches were synced, the dtypes of "
        "model.dtype and the rollout engine, its quantization, and that nothing else changes its distribution, as "
        "rollout.top_k does"
    )
