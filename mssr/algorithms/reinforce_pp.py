"""REINFORCE++ (arXiv 2501.03262), as EasyR1 runs it with the KL in the loss instead of the reward.

    A = (r - mean) / sqrt(variance + eps)      over all TOKENS of the batch

The paper's return of a token is the reward less the KL of the tokens to come. With that KL in the loss and no discount,
a response's tokens all have its reward as return, so mean and variance weigh every response by its length (0 if masked).
EasyR1's and verl's `masked_whiten` has Bessel's correction for the number of tokens, and eps = 1e-8.

No group and no baseline: one response a prompt will do.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mssr.algorithms.loss import policy_loss_config
from mssr.algorithms.outcomes import Outcomes
from mssr.config import AlgorithmConfig
from mssr_kernels import PolicyLossConfig

EPS = 1e-8


@dataclass(frozen=True)
class ReinforcePP:
    config: AlgorithmConfig
    tracked: ClassVar[bool] = False

    def advantages(self, outcomes: Outcomes) -> Tensor:
        return whiten_over_tokens(outcomes.reward, outcomes.lengths)

    def loss_config(self) -> PolicyLossConfig:
        return policy_loss_config(self.config, shaped=False)


def whiten_over_tokens(value: Tensor, lengths: Tensor) -> Tensor:
    """(value - mean) / sqrt(variance + 1e-8), each value counted once for every token of its response.

    The variance is divided by the number of tokens less one. Equal values become exactly 0. A NaN makes everything NaN.

    Args:
        value: [B] float32.
        lengths: [B] int64; a response of 0 tokens counts in neither mean nor variance.

    Returns:
        [B] float32.
    """
    # In float64 the mean of equal float32 values is exactly their value; in float32 it can be an ulp off.
    weight, wide = lengths.double(), value.double()
    tokens = weight.sum()
    centred = wide - (weight * wide).sum() / tokens.clamp(min=1)
    variance = (weight * centred.square()).sum() / (tokens - 1).clamp(min=1)
    return (centred / (variance + EPS).sqrt()).to(value.dtype)
