"""The losses of a training step: the clipped policy loss, and cross-entropy for the warm start.

The fused head (`mssr_kernels.linear_policy_loss`) computes both, gradients included, without forming logits.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mssr.batch import Sequences, UpdateBatch
from mssr.policy.packing import MicroBatch
from mssr_kernels import PolicyLossConfig


class Loss(Protocol):
    """A loss of the fused head, with settings `config`."""

    config: PolicyLossConfig

    def mask(self, batch: Sequences) -> Tensor:
        """Return [B, R] bool, True at the tokens that count."""

    def inputs(self, batch: Sequences, micro_batch: MicroBatch) -> dict[str, Tensor | None]:
        """Return per-token inputs of the fused head, each [N] float32 in the token order of the micro-batch."""


@dataclass(frozen=True)
class PolicyGradient:
    """Clipped, entropy-shaped policy loss of an `UpdateBatch`."""

    config: PolicyLossConfig

    def mask(self, batch: UpdateBatch) -> Tensor:
        return batch.loss_mask

    def inputs(self, batch: UpdateBatch, micro_batch: MicroBatch) -> dict[str, Tensor | None]:
        """Include the sampler's log-probs only for truncated importance weights (TIS).

        With them, shaping by the sampled token uses the sampler's log-probs; without, old_logp, as its authors do.
        """
        return {
            "advantage": _padded(batch.advantage[micro_batch.row], micro_batch),
            "old_logp": _per_token(batch.old_logp, micro_batch),
            "ref_logp": None if batch.ref_logp is None else _per_token(batch.ref_logp, micro_batch),
            "rollout_logp": None if self.config.tis_cap is None else _per_token(batch.logp, micro_batch),
        }


class CrossEntropy:
    """Supervised learning: -log-prob of every response token.

    It is the on-policy policy loss with advantage 1 and ratio 1, so nothing is clipped or shaped; its gradient is -d logp.
    """

    config = PolicyLossConfig.ppo()

    def mask(self, batch: Sequences) -> Tensor:
        return batch.mask

    def inputs(self, batch: Sequences, micro_batch: MicroBatch) -> dict[str, Tensor | None]:
        return {"advantage": _padded(torch.ones(len(micro_batch.row)), micro_batch)}


def _per_token(values: Tensor, micro_batch: MicroBatch) -> Tensor:
    return _padded(values[micro_batch.row, micro_batch.column], micro_batch)


def _padded(values: Tensor, micro_batch: MicroBatch) -> Tensor:
    """Move to the device; an idle micro-batch has one target and no row, whose value is 0."""
    idle = len(micro_batch.target) - len(values)
    return torch.nn.functional.pad(values, (0, idle)).to(micro_batch.target.device)
