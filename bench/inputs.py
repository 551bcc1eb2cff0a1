"""Hidden states and a head whose rows of probabilities are as peaked as a language model's, or flat."""

from typing import NamedTuple

import torch
from torch import Tensor

from mssr_kernels import linear_logprob_entropy

# By kind: the share of rows that are forks, and the ranges of the logit by which the best tokens of a certain row and of a
# fork stand out from the unit-variance noise of all others. log(65536) is 11: at 14 the others together hold 8 % of a row.
KINDS = {
    "peaked": (0.35, (20.0, 30.0), (18.0, 22.0)),
    "realistic": (0.35, (18.0, 30.0), (13.0, 20.0)),
    "flat": None,
}
ALTERNATIVES = 12  # of a fork, each less likely than the one before


class Inputs(NamedTuple):
    hidden: Tensor  # [N, D] leaf
    weight: Tensor  # [V, D] leaf
    target: Tensor  # [N]
    advantage: Tensor  # [N]; none is zero: rows that the kernels skip would flatter them
    old_logp: Tensor  # [N]
    mean_entropy: float
    softcap: float | None = None


def make(
    n: int, d: int, v: int, dtype: torch.dtype, device: str, kind: str, seed: int = 0, softcap: float | None = None
) -> Inputs:
    """Return inputs of a kind. Targets are Zipf-like, as tokens are: a few columns serve many rows, most serve none."""
    generator = torch.Generator(device).manual_seed(seed)
    options = dict(device=device, generator=generator)
    weight = torch.randn(v, d, **options)
    frequencies = 1 / (torch.arange(v, device=device) + 10.0)
    frequencies = frequencies[torch.randperm(v, **options)]

    def tokens() -> Tensor:
        return torch.multinomial(frequencies, n, replacement=True, generator=generator)

    target = tokens()
    hidden = torch.randn(n, d, **options) / d**0.5
    if KINDS[kind] is not None:
        share, certain, forked = KINDS[kind]
        fork = torch.rand(n, 1, **options) < share
        low, high = (torch.where(fork, f, c) for f, c in zip(forked, certain))
        size = low + (high - low) * torch.rand(n, 1, **options)
        hidden += size * weight[target] / d
        for _ in range(ALTERNATIVES):
            size = size - torch.rand(n, 1, **options) * 1.5
            hidden += torch.where(fork, size, 0) * weight[tokens()] / d
    weight, hidden = weight.to(dtype).requires_grad_(), hidden.to(dtype).requires_grad_()
    with torch.no_grad():
        now = linear_logprob_entropy(hidden, weight, target, softcap=softcap)
    return Inputs(
        hidden,
        weight,
        target,
        torch.randn(n, **options),
        now.logp + 0.05 * torch.randn(n, **options),
        now.entropy.mean().item(),
        softcap,
    )


def with_gradients(inputs: Inputs, hidden: bool, weight: bool) -> Inputs:
    """Return detached tensors on the same memory, with `requires_grad` as given and no `.grad`."""
    return inputs._replace(
        hidden=inputs.hidden.detach().requires_grad_(hidden), weight=inputs.weight.detach().requires_grad_(weight)
    )
