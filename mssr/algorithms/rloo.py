"""RLOO: REINFORCE, leave one out (arXiv 2402.14740).

    A = r - mean of the prompt's other responses = (r - mean) * group / (group - 1)

Not normalised. The paper takes one gradient step on a whole response's probability; here, as in EasyR1, A goes into the
shared clipped loss of each token.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mssr.algorithms.groups import grouped
from mssr.algorithms.loss import policy_loss_config
from mssr.algorithms.outcomes import Outcomes
from mssr.config import AlgorithmConfig
from mssr_kernels import PolicyLossConfig


@dataclass(frozen=True)
class RLOO:
    config: AlgorithmConfig
    tracked: ClassVar[bool] = False

    def advantages(self, outcomes: Outcomes) -> Tensor:
        # In float64 the mean of equal float32 rewards is exactly their value; in float32 it can be an ulp off.
        reward = grouped(outcomes.reward.double(), outcomes.group)
        others = (reward.sum(1, keepdim=True) - reward) / (outcomes.group - 1)
        return (reward - others).flatten().to(outcomes.reward.dtype)

    def loss_config(self) -> PolicyLossConfig:
        return policy_loss_config(self.config, shaped=False)
