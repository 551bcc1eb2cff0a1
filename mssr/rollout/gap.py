"""The rollout/trainer log-prob gap: the one number that catches stale weights, caches, names and templates."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mssr.distributed import World
from mssr.errors import UserError


@dataclass(frozen=True)
class LogpGap:
    """|trainer's log-prob - rollout engine's| of the sampled tokens, nats, over all ranks."""

    mean: float
    max: float


def measure_gap(trainer_logp: Tensor, rollout_logp: Tensor, mask: Tensor, world: World) -> LogpGap:
    """All [B, R]; both log-probs under the same weights, before any update."""
    gap = (trainer_logp - rollout_logp).abs()[mask].double()
    total, count = world.sum(torch.stack([gap.sum(), mask.sum().double()]))
    largest = world.max(gap.max() if len(gap) else gap.new_zeros(()))
    return LogpGap(float(total / count), float(largest))


def refuse_large_gap(gap: LogpGap, limit: float, step: int) -> None:
    """Raises:
    UserError: the mean gap is beyond the limit (or NaN): training on it would be training on noise.
    """
    if not gap.mean <= limit:
        raise UserError(
            f"step {step}: rollout and trainer disagree by {gap.mean:.3g} nats a token (rollout.max_gap {limit:g}); "
            "check that weights and caches were synced, the temperature, and the prompt template"
        )
