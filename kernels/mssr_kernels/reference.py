"""The specification: the public functions in a few lines of eager PyTorch each, with autograd's own gradients.

Slow, holds several [N, V] tensors, and is meant to be read. Everything is computed in float32 whatever the dtype of the
inputs, or in float64 if they are float64. The arguments are those of the public functions in `loss`, which validate them;
`backend`, `workspace_bytes` and `vocab_drop_tol` have no effect here.
"""

import math

import torch
from torch import Tensor

from .config import LogprobEntropy, PolicyLoss, PolicyLossConfig
from .core.row_loss import RowTerms, assemble


def linear_logprob_entropy(
    hidden, weight, target, *, bias=None, temperature=1.0, softcap=None, ignore_index=-100, backend="reference",
    workspace_bytes=None,
) -> LogprobEntropy:  # fmt: skip
    """Return log-prob of the target, entropy and log-sum-exp of every row, each [N]. See `loss.linear_logprob_entropy`."""
    rows = (target != ignore_index).nonzero()[:, 0]
    kept = _statistics(hidden, weight, target, bias, temperature, softcap, rows)
    return LogprobEntropy(*(value.new_zeros(hidden.shape[0]).index_copy(0, rows, value) for value in kept))


def linear_policy_loss(
    hidden, weight, target, advantage, old_logp=None, *, ref_logp=None, rollout_logp=None, shaping_entropy=None,
    normalizer=None, config=PolicyLossConfig(), bias=None, temperature=1.0, softcap=None, ignore_index=-100,
    backend="reference", workspace_bytes=None, vocab_drop_tol=None,
) -> PolicyLoss:  # fmt: skip
    """Return the policy loss; all terms of a row's loss, in order. See `loss.linear_policy_loss`."""
    rows = (target != ignore_index).nonzero()[:, 0]
    logp, entropy, _ = _statistics(hidden, weight, target, bias, temperature, softcap, rows)
    advantage, old_logp, ref_logp, rollout_logp, shaping_entropy = (
        None if value is None else value.detach()[rows].to(logp.dtype)
        for value in (advantage, old_logp, ref_logp, rollout_logp, shaping_entropy)
    )

    # Shaped advantage: A' = A + min(alpha * H, |A| / kappa). H carries no gradient.
    if shaping_entropy is None and config.entropy_source == "exact":
        shaping_entropy = entropy.detach()
    elif shaping_entropy is None:
        sampled = next(value for value in (rollout_logp, old_logp, logp.detach()) if value is not None)
        sampled = sampled.clamp(min=-1000)  # a probability of 0 would be 0 * -inf
        shaping_entropy = -sampled.exp() * sampled
    shaping = torch.minimum(config.entropy_alpha * shaping_entropy, advantage.abs() / config.entropy_kappa)
    shaped = advantage + shaping

    # Clipped objective. On-policy (no old_logp) the ratio is exactly 1, and its gradient still flows.
    cap = config.log_ratio_cap
    log_ratio = logp - (logp.detach() if old_logp is None else old_logp)
    capped = log_ratio.detach().abs() > cap
    ratio = torch.exp(log_ratio.clamp(-cap, cap))
    clipped_ratio = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    objective = torch.minimum(ratio * shaped, clipped_ratio * shaped)
    clipped = objective.detach() < (ratio * shaped).detach()
    dual_clipped = torch.zeros_like(clipped)
    if config.dual_clip is not None:
        dual_clipped = (shaped < 0) & (objective.detach() < config.dual_clip * shaped)
        objective = torch.where(dual_clipped, config.dual_clip * shaped, objective)

    # Truncated importance weight of the trainer's policy against the sampler's.
    tis_weight = torch.ones_like(logp)
    if config.tis_cap is not None:
        tis_weight = torch.exp(old_logp - rollout_logp).clamp(max=config.tis_cap)
    policy_loss = -objective * tis_weight

    # k3 estimate of KL(current || reference): e^d - d - 1.
    kl = torch.zeros_like(logp)
    if ref_logp is not None:
        d = (ref_logp - logp).clamp(-cap, cap)
        capped = capped | ((ref_logp - logp).detach().abs() > cap)
        kl = torch.expm1(d) - d

    loss = policy_loss - config.entropy_coef * entropy
    if config.kl_coef > 0:
        loss = loss + config.kl_coef * kl
    terms = RowTerms(
        loss, logp, entropy, shaped, shaping, ratio, clipped, dual_clipped, tis_weight, policy_loss, kl, capped
    )

    if normalizer is None:
        normalizer = max(len(rows), 1)
    normalizer = torch.as_tensor(normalizer, dtype=logp.dtype, device=logp.device).detach()
    return assemble(terms, rows, hidden.shape[0], loss.sum() / normalizer)


def _statistics(hidden, weight, target, bias, temperature, softcap, rows) -> tuple[Tensor, Tensor, Tensor]:
    """Return logp, entropy and lse of the given rows, each [len(rows)]. Rows not given are never read."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logits = hidden[rows].to(dtype) @ weight.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if isinstance(temperature, Tensor):
        logits = logits / temperature.detach()[rows, None].to(dtype)
    elif temperature != 1:
        logits = logits / temperature

    log_p = torch.log_softmax(logits, dim=1)
    logp = log_p.gather(1, target[rows, None])[:, 0]
    p = log_p.exp()
    if bias is not None:  # a bias of -inf masks a column: its 0 * -inf is 0
        log_p = log_p.masked_fill(log_p == -math.inf, 0)
    return logp, -(p * log_p).sum(dim=1), torch.logsumexp(logits, dim=1)
