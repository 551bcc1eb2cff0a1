"""How far log-probs, entropies and gradients are from those in float64 of the same inputs."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .inputs import Inputs
from .jobs import OBJECTIVES

CHUNK_BYTES = 256 << 20  # of float64 logits at a time
MOST_FLOPS = {
    "cpu": 1e12,
    "cuda": 2e14,
}  # of one objective, in float64: about a minute on two cores, seconds on an H200


class Exact(NamedTuple):
    """In float64, of the first rows."""

    logp: Tensor  # [R]
    entropy: Tensor  # [R]
    d_hidden: Tensor  # [R, D]
    d_weight: Tensor | None  # [V, D]; None where R < N


def rows_of(n: int, d: int, v: int, device: str) -> int:
    """As many rows as float64 takes no more than MOST_FLOPS for."""
    return min(n, max(1, int(MOST_FLOPS[device] / (8 * d * v))))


@torch.no_grad()
def exact(inputs: Inputs, objective: str, rows: int) -> Exact:
    """The loss is that of all rows; its gradient by the hidden states of the first `rows`, and by the weight if these are
    all of them. Not autograd's: dloss/dlogp is, and dlogp/dz = onehot - p by hand, a chunk of rows at a time."""
    weight = inputs.weight.detach().double()
    found = [(logp, entropy) for *_, logp, entropy in _chunks(inputs, weight, rows)]
    logp, entropy = (torch.cat(parts) for parts in zip(*found))
    upstream = _by_logp(inputs, objective, logp, entropy)
    d_hidden = torch.empty(rows, weight.shape[1], dtype=torch.float64, device=weight.device)
    d_weight = torch.zeros_like(weight) if rows == len(inputs.target) else None
    for here, hidden, logits, log_p, *_ in _chunks(inputs, weight, rows):
        gradient = log_p.exp_().neg_()
        gradient[torch.arange(len(gradient), device=gradient.device), inputs.target[here]] += 1
        gradient *= upstream[here, None]
        if inputs.softcap is not None:
            gradient *= 1 - (logits / inputs.softcap) ** 2  # of cap * tanh(x / cap)
        torch.mm(gradient, weight, out=d_hidden[here])
        if d_weight is not None:
            d_weight.addmm_(gradient.T, hidden)
    return Exact(logp, entropy, d_hidden, d_weight)


def _chunks(
    inputs: Inputs, weight: Tensor, rows: int
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor, Tensor]]:
    size = max(1, CHUNK_BYTES // (8 * len(weight)))
    for start in range(0, rows, size):
        here = slice(start, min(start + size, rows))
        hidden = inputs.hidden.detach()[here].double()
        logits = hidden @ weight.T
        if inputs.softcap is not None:
            logits = inputs.softcap * torch.tanh(logits / inputs.softcap)
        log_p = torch.log_softmax(logits, dim=1)
        logp = log_p.gather(1, inputs.target[here, None])[:, 0]
        yield here, hidden, logits, log_p, logp, -(log_p.exp() * log_p).sum(1)


def _by_logp(inputs: Inputs, objective: str, logp: Tensor, entropy: Tensor) -> Tensor:
    """dloss/dlogp [R]: row by row, so that what the rows beyond hold does not matter."""
    rows = len(logp)
    all_logp, all_entropy = inputs.old_logp.double(), torch.zeros_like(inputs.old_logp, dtype=torch.float64)
    all_logp[:rows], all_entropy[:rows] = logp, entropy
    with torch.enable_grad():
        loss = OBJECTIVES[objective](all_logp.requires_grad_(), all_entropy, inputs)
    return torch.autograd.grad(loss, all_logp)[0][:rows]


def errors(
    exact: Exact, logp: Tensor | None, entropy: Tensor | None, d_hidden: Tensor | None, d_weight: Tensor | None
) -> dict[str, float]:
    """logp, entropy: the largest difference, in nats. d_hidden, d_weight: the norm of the difference over the norm. Of what
    is given, as far as the exact values go. NaN if anything is not finite."""
    found, rows = {}, len(exact.logp)
    for name, value, right in (("logp", logp, exact.logp), ("entropy", entropy, exact.entropy)):
        if value is not None:
            found[name] = (value.detach()[:rows].double() - right).abs().max().item()
    if d_hidden is not None:
        found["d_hidden"] = _relative(d_hidden[:rows], exact.d_hidden)
    if d_weight is not None and exact.d_weight is not None:
        found["d_weight"] = _relative(d_weight, exact.d_weight)
    return found


def _relative(got: Tensor, right: Tensor) -> float:
    return ((got.double() - right).norm() / right.norm()).item()
