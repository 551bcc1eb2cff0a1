"""Random hidden states and a head; their token distributions are as peaked as a language model's, or flat."""

from typing import NamedTuple

import torch
from torch import Tensor

from mssr_kernels import linear_logprob_entropy

# By kind: the share of rows that are forks (several likely tokens), and the range of the best token's logit in certain rows
# and in forks. The logits of all other tokens are noise of unit variance: at V 65536 and a best logit of 14 they hold 8 %.
KINDS = {
    "peaked": (0.35, (20.0, 30.0), (18.0, 22.0)),
    "realistic": (0.35, (18.0, 30.0), (13.0, 20.0)),
    "flat": None,
}
ALTERNATIVES = 12  # per fork, each less likely than the one before


class Inputs(NamedTuple):
    hidden: Tensor  # [N, D] leaf
    weight: Tensor  # [V, D] leaf
    target: Tensor  # [N]
    advantage: Tensor  # [N]; never zero, because the kernels skip such rows
    old_logp: Tensor  # [N]
    mean_entropy: float


def make(n: int, d: int, v: int, dtype: torch.dtype, device: str, kind: str, seed: int = 0) -> Inputs:
    """Return inputs of a kind. Targets follow Zipf's law, as tokens do: few columns are frequent, most do not occur."""
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
        now = linear_logprob_entropy(hidden, weight, target)
    return Inputs(
        hidden,
        weight,
        target,
        torch.randn(n, **options),
        now.logp + 0.05 * torch.randn(n, **options),
        now.entropy.mean().item(),
    )
