"""MVSR: vanilla single-rollout RL, the baseline of arXiv 2512.18215 that collapses.

MSSR without entropy shaping. In the authors' scripts that switch is the only difference, so it is here.
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
class MVSR:
    config: AlgorithmConfig
    tracked: ClassVar[bool] = True

    def advantages(self, outcomes: Outcomes) -> Tensor:
        return batch_normalise(outcomes.reward - outcomes.baseline)

    def loss_config(self) -> PolicyLossConfig:
        return policy_loss_config(self.config, shaped=False)
