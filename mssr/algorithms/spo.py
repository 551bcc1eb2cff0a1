"""SPO: single-stream policy optimisation (arXiv 2509.13232), the method that MSSR builds on.

    A = r - v                    one response a prompt, v from the value tracker
    A = (A - mean) / std         over the rollout batch
    prompts drawn with weight sqrt(v (1 - v)) + 0.05

SPO's, as its recipe for verl has them: the tracker with a smoothed start and per-prompt drift (our tracker's default
preset), the two lines above, the prompts' weights (`data.sampler.PrioritisedSampler`), PPO's clipped loss, no shaping.
So the arithmetic here is MVSR's, and the difference is which prompts a step trains on.

Ours: weights go over the whole data set, where the recipe draws a step from a larger batch of the epoch; the std is
the biased one (the recipe's: unbiased, plus 1e-8), a factor of sqrt(1 - 1/B); a prompt starts from one rollout unless
algorithm.tracker.n_init asks for more (the recipe: a number of them, made beforehand); dual clip and KL term are there
unless they are switched off.
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
class SPO:
    config: AlgorithmConfig
    tracked: ClassVar[bool] = True

    def advantages(self, outcomes: Outcomes) -> Tensor:
        return batch_normalise(outcomes.reward - outcomes.baseline)

    def loss_config(self) -> PolicyLossConfig:
        return policy_loss_config(self.config, shaped=False)
