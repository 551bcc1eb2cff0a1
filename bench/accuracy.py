"""Errors of log-probs, entropies and gradients against float64 with the same inputs."""

from typing import NamedTuple

import torch
from torch import Tensor

from .inputs import Inputs
from .jobs import OBJECTIVES

CHUNK_BYTES = 256 << 20  # of float64 logits at a time
MOST_FLOPS = {"cpu": 1e12, "cuda": 2e14}  # per objective in float64: about a minute on two cores, seconds on an H200


class Exact(NamedTuple):
    """Exact values of the first R rows, float64."""

    logp: Tensor  # [R]
    entropy: Tensor  # [R]
    d_hidden: Tensor  # [R, D]
    d_weight: Tensor | None  # [V, D]; None where R < N


def rows_of(n: int, d: int, v: int, device: str) -> int:
    """Return how many rows float64 can do with MOST_FLOPS."""
    return min(n, max(1, int(MOST_FLOPS[device] / (8 * d * v))))


def exact(inputs: Inputs, objective: str, rows: int) -> Exact:
    """Return the exact values of the first `rows` rows, computed a chunk at a time.

    The gradients are those of the loss over all rows, by the first hidden states, and by the weight if `rows` is all of them.
    """
    n = len(inputs.target)
    weight = inputs.weight.detach().double().requires_grad_(rows == n)
    chunks = torch.arange(rows).split(max(1, CHUNK_BYTES // (8 * len(weight))))
    places = [slice(int(chunk[0]), int(chunk[-1]) + 1) for chunk in chunks]
    with torch.no_grad():
        found = [_statistics(inputs.hidden[here].double(), weight, inputs.target[here]) for here in places]
    logp, entropy = (torch.cat(parts) for parts in zip(*found))
    upstream, gradients = _by_logp(inputs, objective, logp, entropy), []
    for here in places:
        hidden = inputs.hidden.detach()[here].double().requires_grad_()
        _statistics(hidden, weight, inputs.target[here])[0].backward(upstream[here])
        gradients.append(hidden.grad)
    return Exact(logp, entropy, torch.cat(gradients), weight.grad)


def _statistics(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probs and entropies [n]."""
    log_p = torch.log_softmax(hidden @ weight.T, dim=1)
    return log_p.gather(1, target[:, None])[:, 0], -(log_p.detach().exp() * log_p.detach()).sum(1)


def _by_logp(inputs: Inputs, objective: str, logp: Tensor, entropy: Tensor) -> Tensor:
    """Return dloss/dlogp [R]; it does not depend on the values of other rows."""
    rows = len(logp)
    all_logp, all_entropy = inputs.old_logp.double(), torch.zeros_like(inputs.old_logp, dtype=torch.float64)
    all_logp[:rows], all_entropy[:rows] = logp, entropy
    with torch.enable_grad():
        loss = OBJECTIVES[objective](all_logp.requires_grad_(), all_entropy, inputs)
    return torch.autograd.grad(loss, all_logp)[0][:rows]


def errors(
    exact: Exact, logp: Tensor | None, entropy: Tensor | None, d_hidden: Tensor | None, d_weight: Tensor | None
) -> dict[str, float]:
    """Return the errors of the given values in the exact rows; NaN if anything is not finite.

    logp, entropy: largest difference, in nats. Gradients: norm of the difference over the norm.
    """
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
