"""GRPO: group-relative policy optimisation (arXiv 2402.03300, section 4.1.2).

    A = (r - mean) / (std + eps)      mean and std of the rewards of the same prompt's responses

The paper leaves open which std, and has no eps. Both are EasyR1's here, which the GRPO runs of arXiv 2512.18215 used:
the unbiased std (divided by group - 1) and eps = 1e-6. With rewards 0 and 1 the smallest std is 1 / sqrt(group), so eps
only matters where all rewards are equal, and there A is exactly 0, not rounding noise over eps.

The loss is the shared one, with its mean over all tokens of an update (the paper's: over a response's, then responses).
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mssr.algorithms.groups import grouped
from mssr.algorithms.loss import policy_loss_config
from mssr.algorithms.outcomes import Outcomes
from mssr.config import AlgorithmConfig
from mssr_kernels import PolicyLossConfig

EPS = 1e-6


@dataclass(frozen=True)
class GRPO:
    config: AlgorithmConfig
    tracked: ClassVar[bool] = False

    def advantages(self, outcomes: Outcomes) -> Tensor:
        # In float64 the mean of equal float32 rewards is exactly their value; in float32 it can be an ulp off.
        reward = grouped(outcomes.reward.double(), outcomes.group)
        centred = reward - reward.mean(1, keepdim=True)
        return (centred / (reward.std(1, keepdim=True) + EPS)).flatten().to(outcomes.reward.dtype)

    def loss_config(self) -> PolicyLossConfig:
        return policy_loss_config(self.config, shaped=False)
