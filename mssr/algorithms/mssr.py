"""MSSR: stable single-rollout RL (arXiv 2512.18215).

    A   = r - v                          one response a prompt, v from the value tracker
    A   = (A - mean) / std               over the rollout batch
    A'  = A + min(alpha * H, |A| / kappa)   per token, inside the fused loss

This file holds the first two lines. The third needs every token's entropy, which exists only where the logits do:
`linear_policy_loss` applies it, and `loss_config` tells it how (`shaping.shape` is the same formula, for tests).
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mssr.algorithms.loss import policy_loss_config
from mssr.algorithms.normalise import batch_normalise
from mssr.algorithms.outcomes import Outcomes
from mssr.config import AlgorithmConfig
from mssr_kernels import PolicyLossConfig


@dataclass(frozen=True)
class MSSR:
    config: AlgorithmConfig
    tracked: ClassVar[bool] = True

    def advantages(self, outcomes: Outcomes) -> Tensor:
        return batch_normalise(outcomes.reward - outcomes.baseline)

    def loss_config(self) -> PolicyLossConfig:
        return policy_loss_config(self.config, shaped=True)
