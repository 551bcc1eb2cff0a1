"""Independent oracle: float64 and autograd, written from the formulas without the package's own code."""

import torch


def logits64(hidden, weight, bias=None, temperature=1.0, softcap=None):
    z = torch.einsum("nd,vd->nv", hidden, weight)
    if bias is not None:
        z = z + bias
    if softcap is not None:
        z = torch.tanh(z / softcap) * softcap
    if isinstance(temperature, torch.Tensor):
        return z / temperature.double().unsqueeze(1)
    return z / temperature


def logprob_entropy(hidden, weight, target, ignore_index=-100, **head):
    """Return (logp, entropy, lse), each [N] float64, zero in ignored rows. hidden, weight and bias are float64."""
    keep = target != ignore_index
    hidden = torch.where(keep[:, None], hidden, torch.zeros((), dtype=hidden.dtype))  # NaN * 0 would be NaN
    z = logits64(hidden, weight, **head)
    distribution = torch.distributions.Categorical(logits=z)
    label = torch.where(keep, target, 0)
    zero = torch.zeros((), dtype=z.dtype)
    return tuple(
        torch.where(keep, value, zero)
        for value in (distribution.log_prob(label), distribution.entropy(), torch.logsumexp(z, 1))
    )


def policy_loss(
    hidden,
    weight,
    target,
    advantage,
    old_logp=None,
    *,
    ref_logp=None,
    rollout_logp=None,
    shaping_entropy=None,
    normalizer=None,
    config,
    ignore_index=-100,
    **head,
):
    """Return the scalar loss, computed row by row with explicit cases."""
    logp, entropy, _ = logprob_entropy(hidden, weight, target, ignore_index, **head)
    total, count = logp.new_zeros(()), 0
    for t in range(len(target)):
        if target[t] == ignore_index:
            continue
        count += 1
        old = logp[t].detach() if old_logp is None else old_logp[t].double()
        if shaping_entropy is not None:
            h = shaping_entropy[t].double()
        elif config.entropy_source == "exact":
            h = entropy[t].detach()
        else:
            sampled = rollout_logp[t] if rollout_logp is not None else old
            h = -(sampled.double().exp() * sampled.double())
        a = advantage[t].double()
        a = a + min(config.entropy_alpha * h, a.abs() / config.entropy_kappa)
        ratio = (logp[t] - old).exp()
        if a >= 0:
            objective = a * min(ratio, torch.tensor(1 + config.clip_high).double())
        else:
            bound = max(ratio, torch.tensor(1 - config.clip_low).double())
            if config.dual_clip is not None:
                bound = min(bound, torch.tensor(config.dual_clip).double())
            objective = a * bound
        if config.tis_cap is not None:
            objective = objective * (old - rollout_logp[t].double()).exp().clamp(max=config.tis_cap)
        total = total - objective
        if config.kl_coef:
            d = ref_logp[t].double() - logp[t]
            total = total + config.kl_coef * (d.exp() - d - 1)
        total = total - config.entropy_coef * entropy[t]
    if normalizer is None:
        normalizer = max(count, 1)
    return total / float(normalizer)


def gradients64(function, hidden, weight, *arguments, bias=None, **keywords):
    """Return the value of a scalar function and its float64 gradients with respect to hidden, weight and bias."""
    leaves = [None if t is None else t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    value = function(leaves[0], leaves[1], *arguments, bias=leaves[2], **keywords)
    value.backward()
    return value.detach(), [None if t is None else t.grad for t in leaves]
