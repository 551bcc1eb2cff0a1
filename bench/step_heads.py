"""The heads that `bench.step` compares: each replaces the policy's own, and the rest of the step stays as it is.

All of them see only response tokens, as in the trainer: a head that also got the prompts would look worse.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mssr_kernels import FusedLMHead, PolicyLoss, PolicyLossConfig, PolicyMetrics

from .inputs import Inputs
from .jobs import Provider, clipped_loss
from .providers import PROVIDERS

LOWEST = -1e4  # logit of a forbidden column: its probability is 0, and 0 times its logarithm is 0, not NaN


class EagerHead(FusedLMHead):
    """All logits, then autograd: the loss that `bench.kernels` calls eager."""

    def forward(self, hidden, target=None, advantage=None, *, config=None, old_logp=None, normalizer=None, **rest):
        if advantage is None:
            return super().forward(hidden, target, **rest)
        require_plain(config, **rest)
        log_p = torch.log_softmax(F.linear(hidden, self.weight, self._column_bias().clamp(min=LOWEST)).float(), dim=1)
        logp = log_p.gather(1, target[:, None])[:, 0]
        with torch.no_grad():
            entropy = -log_p.exp().mul_(log_p).sum(1)
        inputs = Inputs(hidden, self.weight, target, advantage, old_logp, 0.0)
        shaped = entropy if config.entropy_alpha else torch.zeros_like(entropy)
        loss = clipped_loss(logp, shaped, inputs) * (len(target) / normalizer)
        return result(loss, normalizer, logp.detach(), entropy)


class LigerHead(FusedLMHead):
    """Liger's fused linear GRPO loss, at its best: every token is a sequence, so there is no padding and each has its own
    advantage; all are one chunk, since it splits the vocabulary itself. It has no entropy, so advantages are not shaped, and
    it returns no log-probs."""

    def forward(self, hidden, target=None, advantage=None, *, config=None, old_logp=None, normalizer=None, **rest):
        if advantage is None:
            return super().forward(hidden, target, **rest)
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        require_plain(config, **rest)
        loss = LigerFusedLinearGRPOLoss(
            beta=0.0, use_ref_model=False, chunk_size=len(target), epsilon_low=config.clip_low,
            epsilon_high=config.clip_high,
        )(
            hidden[:, None], self.weight, target[:, None], torch.ones_like(advantage)[:, None], advantage,
            bias=self._column_bias().detach(), old_per_token_logps=old_logp[:, None], num_items_in_batch=normalizer,
        )[0]  # fmt: skip
        nothing = torch.zeros_like(advantage)
        return result(loss, normalizer, nothing, nothing)


def require_plain(
    config: PolicyLossConfig,
    *,
    temperature: float,
    ref_logp=None,
    rollout_logp=None,
    vocab_drop_tol: float | None = None,
):
    """Refuse options that these heads do not have."""
    if temperature != 1 or ref_logp is not None or config.kl_coef or config.entropy_coef or config.tis_cap:
        raise ValueError("bench.step: its heads do not support temperature, KL, entropy bonus or TIS; remove them")
    if vocab_drop_tol is not None:
        raise ValueError("the heads of bench.step have exact gradients: no vocab_drop_tol")


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


# The others are compared with the first.
HEADS = {
    "eager": Head(PROVIDERS["eager"], EagerHead),
    "liger": Head(PROVIDERS["liger GRPO"], LigerHead),
    "mssr": Head(PROVIDERS["mssr exact"], FusedLMHead),
}
