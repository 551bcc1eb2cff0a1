"""The heads that `bench.step` compares: each replaces the policy's own, everything else in the update stays the same.

All of them see only response tokens, as in the trainer: a head that also got the prompts would look worse.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mssr_kernels import FusedLMHead, PolicyLoss, PolicyMetrics

from .inputs import Inputs
from .jobs import Provider, clipped_loss, select_rows
from .providers import PROVIDERS

LOWEST = -1e4  # logit of a forbidden column: finite, so that its probability 0 times its log-prob is 0, not NaN


class EagerHead(FusedLMHead):
    """All logits, then autograd: `eager` of `bench.kernels`."""

    def forward(self, hidden, target=None, advantage=None, *, config=None, old_logp=None, normalizer=None, **rest):
        if advantage is None:
            return super().forward(hidden, target, **rest)
        log_p = torch.log_softmax(F.linear(hidden, self.weight, self._column_bias().clamp(min=LOWEST)).float(), dim=1)
        logp, entropy = select_rows(log_p, target)
        inputs = Inputs(hidden, self.weight, target, advantage, old_logp, 0.0)
        shaped = entropy if config.entropy_alpha else torch.zeros_like(entropy)
        loss = clipped_loss(logp, shaped, inputs) * (len(target) / normalizer)
        return result(loss, normalizer, logp.detach(), entropy)


class LigerHead(FusedLMHead):
    """Liger's fused linear GRPO loss in its best configuration: every token is a sequence, so that there is no padding and
    each has its own advantage; all are one chunk, because it splits the vocabulary itself. It returns neither entropies, so
    advantages are not shaped, nor log-probs."""

    def forward(self, hidden, target=None, advantage=None, *, config=None, old_logp=None, normalizer=None, **rest):
        if advantage is None:
            return super().forward(hidden, target, **rest)
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        loss = LigerFusedLinearGRPOLoss(
            beta=0.0, use_ref_model=False, chunk_size=len(target), epsilon_low=config.clip_low,
            epsilon_high=config.clip_high,
        )(
            hidden[:, None], self.weight, target[:, None], torch.ones_like(advantage)[:, None], advantage,
            bias=self._column_bias().detach(), old_per_token_logps=old_logp[:, None], num_items_in_batch=normalizer,
        )[0]  # fmt: skip
        nothing = torch.zeros_like(advantage)
        return result(loss, normalizer, nothing, nothing)


def result(loss: Tensor, normalizer: float, logp: Tensor, entropy: Tensor) -> PolicyLoss:
    """Return the loss with the metrics that the benchmark reads; the others are 0."""
    zero, rows = loss.detach().new_zeros(()), torch.tensor(float(len(logp)), device=loss.device)
    metrics = PolicyMetrics(*[zero] * len(PolicyMetrics._fields))._replace(
        rows=rows, policy_loss_sum=loss.detach() * normalizer, entropy_sum=entropy.sum()
    )
    return PolicyLoss(loss, logp, entropy, zero, zero, zero, metrics)


class Head(NamedTuple):
    provider: Provider
    kind: type[FusedLMHead]


HEADS = {
    "eager": Head(PROVIDERS["eager"], EagerHead),
    "liger": Head(PROVIDERS["liger GRPO"], LigerHead),
    "mssr": Head(PROVIDERS["mssr exact"], FusedLMHead),
}
