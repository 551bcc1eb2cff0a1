"""MVSR: vanilla single-rollout RL, the baseline of arXiv 2512.18215 that collapses.

MSSR without entropy shaping. In the authors' scripts that switch is the only difference, so it is here.
"""

from mssr.algorithms.mssr import MSSR
from mssr.config import AlgorithmConfig


class MVSR(MSSR):
    def __init__(self, config: AlgorithmConfig) -> None:
        super().__init__(config.model_copy(update={"entropy_alpha": 0.0}))
