"""The loss of one row given its statistics, with its derivative written out.

For the row's log-probability l and entropy H, with everything else constant:

    A'   = A + min(alpha * H_s, |A| / kappa)            H_s: H or a stand-in, detached
    r    = exp(l - l_old)                               dr/dl = r;  l_old = l (detached) when there is none
    obj  = min(r A', clip(r) A')                        flat where A' > 0 and r > 1 + clip_high,
                                                              or   A' < 0 and r < 1 - clip_low
    obj  = max(obj, c A')  where A' < 0                 flat where r > c
    w    = min(exp(l_old - l_rollout), tis_cap)         constant
    kl   = e^d - d - 1,  d = l_ref - l                  dkl/dl = 1 - e^d
    loss = -obj w + kl_coef kl - entropy_coef H

l - l_old and d are first clamped to [-log_ratio_cap, log_ratio_cap], so that r and e^d are finite and an advantage of 0 never
meets an infinity; dr/dl and dkl/dl are 0 where they are clamped.

so  a = dloss/dl = -r A' w [not flat] + kl_coef (1 - e^d)   and   g = dloss/dH = -entropy_coef.

The sign of A', not of A, decides where the ratio is clipped; this makes kappa < 1 safe. Everything is row-local, so a
gradient can be formed in the forward pass, while the logits of the row are in memory.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..config import PolicyLoss, PolicyLossConfig, PolicyMetrics
from .inputs import RowInputs
from .statistics import FLOOR


class RowTerms(NamedTuple):
    """The terms of each row's loss, each [rows]."""

    loss: Tensor
    logp: Tensor
    entropy: Tensor
    advantage: Tensor  # shaped
    shaping: Tensor
    ratio: Tensor
    clipped: Tensor  # bool
    dual_clipped: Tensor  # bool
    tis_weight: Tensor
    policy_loss: Tensor
    kl: Tensor
    capped: Tensor  # bool


def row_loss(logp: Tensor, entropy: Tensor, rows: RowInputs, config: PolicyLossConfig) -> tuple[RowTerms, Tensor]:
    """Return the terms of the loss and its derivative by logp, each [rows], not divided by the normalizer.

    The derivative by the entropy is the constant -config.entropy_coef.
    """
    shaping = torch.minimum(
        config.entropy_alpha * _shaping_entropy(logp, entropy, rows, config),
        rows.advantage.abs() / config.entropy_kappa,
    )
    advantage = rows.advantage + shaping

    log_ratio, capped = _cap(logp - (logp if rows.old_logp is None else rows.old_logp), config)
    ratio = torch.exp(log_ratio)
    low, high = 1 - config.clip_low, 1 + config.clip_high
    objective = torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
    clipped = ((advantage > 0) & (ratio > high)) | ((advantage < 0) & (ratio < low))
    dual_clipped = torch.zeros_like(clipped)
    if config.dual_clip is not None:
        dual_clipped = (advantage < 0) & (ratio > config.dual_clip)
        objective = torch.where(dual_clipped, config.dual_clip * advantage, objective)

    tis_weight = torch.ones_like(logp)
    if config.tis_cap is not None:
        tis_weight = torch.exp(rows.old_logp - rows.rollout_logp).clamp(max=config.tis_cap)
    policy_loss = -objective * tis_weight
    loss = policy_loss - config.entropy_coef * entropy
    slope = (-ratio * advantage * tis_weight).masked_fill(clipped | dual_clipped | capped, 0)

    kl = torch.zeros_like(logp)
    if rows.ref_logp is not None:
        d, kl_capped = _cap(rows.ref_logp - logp, config)
        kl = torch.expm1(d) - d
        if config.kl_coef > 0:
            loss = loss + config.kl_coef * kl
            slope = slope - (config.kl_coef * torch.expm1(d)).masked_fill(kl_capped, 0)
        capped = capped | kl_capped
    terms = RowTerms(
        loss, logp, entropy, advantage, shaping, ratio, clipped, dual_clipped, tis_weight, policy_loss, kl, capped
    )
    return terms, slope


def _cap(log_ratio: Tensor, config: PolicyLossConfig) -> tuple[Tensor, Tensor]:
    """Return the clamped log-ratio, and where it was clamped. NaN stays NaN."""
    cap = config.log_ratio_cap
    return log_ratio.clamp(-cap, cap), log_ratio.abs() > cap


def assemble(terms: RowTerms, rows: Tensor, total_rows: int, loss: Tensor) -> PolicyLoss:
    """Return the public result: `terms` belong to the row numbers `rows` of `total_rows`; all others hold zeros."""
    terms = RowTerms(*(term.detach() for term in terms))

    def scatter(value: Tensor) -> Tensor:
        return value.new_zeros(total_rows).index_copy_(0, rows, value)

    metrics = PolicyMetrics(
        rows=torch.full_like(loss.detach(), len(rows)),
        policy_loss_sum=terms.policy_loss.sum(), kl_sum=terms.kl.sum(), entropy_sum=terms.entropy.sum(),
        clipped_sum=terms.clipped.sum(dtype=loss.dtype), dual_clipped_sum=terms.dual_clipped.sum(dtype=loss.dtype),
        ratio_sum=terms.ratio.sum(), ratio_max=terms.ratio.max() if len(rows) else torch.zeros_like(loss.detach()),
        tis_weight_sum=terms.tis_weight.sum(), shaping_sum=terms.shaping.sum(),
        log_ratio_capped_sum=terms.capped.sum(dtype=loss.dtype),
    )  # fmt: skip
    return PolicyLoss(
        loss, logp=scatter(terms.logp), entropy=scatter(terms.entropy), advantage=scatter(terms.advantage),
        ratio=scatter(terms.ratio), clipped=scatter(terms.clipped | terms.dual_clipped), metrics=metrics,
    )  # fmt: skip


def _shaping_entropy(logp: Tensor, entropy: Tensor, rows: RowInputs, config: PolicyLossConfig) -> Tensor:
    if rows.shaping_entropy is not None:
        return rows.shaping_entropy
    if config.entropy_source == "exact":
        return entropy
    sampled = next(value for value in (rows.rollout_logp, rows.old_logp, logp) if value is not None)
    sampled = sampled.clamp(min=FLOOR)  # a probability of 0 would be 0 * -inf
    return -sampled.exp() * sampled
