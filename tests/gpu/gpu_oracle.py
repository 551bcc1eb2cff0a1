"""An independent oracle: float64 and autograd, some rows at a time, written from the formulas without the package's code.

Also the usual eager implementation: logits in the dtype of the operands, everything after them in float32.
"""

import torch

ROWS_AT_ONCE = 128


def differentiate(loss_of_rows, hidden, weight, target, bias=None, temperature=1.0, softcap=None, ignore_index=-100):
    """Return (logp, entropy, lse), each [N] float64, and the loss's gradients by hidden, weight and bias.

    loss_of_rows(rows, logp, entropy, lse) -> 0-d: the loss of these rows (row numbers), given their statistics.
    """
    kept = (target != ignore_index).nonzero()[:, 0]
    values = torch.zeros(3, len(target), dtype=torch.float64, device=hidden.device)
    d_hidden = torch.zeros(hidden.shape, dtype=torch.float64, device=hidden.device)
    w, b = (None if t is None else t.detach().double().requires_grad_() for t in (weight, bias))
    for rows in kept.split(ROWS_AT_ONCE):
        h = hidden.detach()[rows].double().requires_grad_()
        here = temperature[rows].double() if isinstance(temperature, torch.Tensor) else temperature
        found = _statistics(h @ w.T if b is None else h @ w.T + b, target[rows], here, softcap)
        loss_of_rows(rows, *found).backward()
        values[:, rows] = torch.stack(found).detach()
        d_hidden[rows] = h.grad
    return tuple(values), [d_hidden, w.grad, None if b is None else b.grad]


def eager(loss_of_rows, hidden, weight, target, bias=None, temperature=1.0, softcap=None, ignore_index=-100):
    """Return the same with logits and gradients in the dtype of the operands; values are float32."""
    kept = (target != ignore_index).nonzero()[:, 0]
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (hidden, weight, bias)]
    logits = torch.nn.functional.linear(leaves[0][kept], leaves[1], leaves[2]).float()
    here = temperature[kept] if isinstance(temperature, torch.Tensor) else temperature
    found = _statistics(logits, target[kept], here, softcap)
    loss_of_rows(kept, *found).backward()
    values = torch.zeros(3, len(target), device=hidden.device)
    values[:, kept] = torch.stack(found).detach()
    return tuple(values), [None if t is None else t.grad for t in leaves]


def _statistics(z, target, temperature, softcap):
    if softcap is not None:
        z = torch.tanh(z / softcap) * softcap
    z = z / (temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature)
    log_p = z.log_softmax(1)
    finite = torch.where(log_p.isfinite(), log_p, 0)  # 0 * -inf
    entropy = -(log_p.exp() * finite).sum(1)
    return log_p.gather(1, target[:, None])[:, 0], entropy, z.logsumexp(1)


def weighted(coefficients):
    """Return a loss with any upstream gradient: coefficients [3, N] of logp, entropy and lse."""

    def loss_of_rows(rows, *statistics):
        return sum((c.to(value.dtype) * value).sum() for c, value in zip(coefficients[:, rows], statistics))

    return loss_of_rows


def policy(config, normalizer, advantage, old_logp=None, ref_logp=None, rollout_logp=None):
    """Return the policy loss, written by cases of the sign of A'."""

    def loss_of_rows(rows, logp, entropy, lse):
        def take(field):
            return field[rows].to(logp.dtype)

        old = logp.detach() if old_logp is None else take(old_logp)
        a = take(advantage)
        a = a + torch.minimum(config.entropy_alpha * entropy.detach(), a.abs() / config.entropy_kappa)
        ratio = (logp - old).exp()
        up, down = ratio.clamp(max=1 + config.clip_high), ratio.clamp(min=1 - config.clip_low)
        if config.dual_clip is not None:
            down = down.clamp(max=config.dual_clip)
        objective = a * torch.where(a >= 0, up, down)
        if config.tis_cap is not None:
            objective = objective * (old - take(rollout_logp)).exp().clamp(max=config.tis_cap)
        loss = -objective - config.entropy_coef * entropy
        if config.kl_coef:
            d = take(ref_logp) - logp
            loss = loss + config.kl_coef * (d.exp() - d - 1)
        return loss.sum() / normalizer

    return loss_of_rows


def errors(found, exact):
    """Return name -> (norm of the error, norm of the exact result). found, exact: (values, gradients)."""
    names = ("logp", "entropy", "lse", "hidden", "weight", "bias")
    pairs = [(n, a, b) for n, a, b in zip(names, (*found[0], *found[1]), (*exact[0], *exact[1])) if a is not None]
    return {n: (_distance(a, b), b.norm().item()) for n, a, b in pairs}


def _distance(a, b):
    """Return the norm of a - b, summed piece by piece: a float64 copy of a [V, D] gradient is large."""
    return sum((x.double() - y).square().sum().item() for x, y in zip(a.split(16384), b.split(16384))) ** 0.5


def assert_no_less_exact(ours, theirs, exact, factor=1.0, rounding=0.0):
    """Check that our error against float64 is at most factor x eager's + 1e-6 x max(1, norm of the result).

    rounding: a gradient's error may also be this share of its norm, whatever eager's error is.
    """
    ours, theirs = errors(ours, exact), errors(theirs, exact)
    for name, (error, size) in ours.items():
        allowed = factor * theirs[name][0] + 1e-6 * max(1.0, size)
        if name in ("hidden", "weight", "bias"):
            allowed = max(allowed, rounding * size)
        assert error <= allowed, f"{name}: error {error:.3e} > {allowed:.3e}, norm {size:.3e}"
