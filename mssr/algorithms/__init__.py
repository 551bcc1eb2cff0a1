"""Algorithms: how rewards become advantages, and which loss the policy takes a step on.

One file an algorithm. `shaping`, `normalise` and `value_tracker` hold the pure functions they are made of.
"""

from typing import Protocol

from torch import Tensor

from mssr.algorithms.mssr import MSSR
from mssr.algorithms.mvsr import MVSR
from mssr.config import AlgorithmConfig
from mssr.errors import UserError
from mssr_kernels import PolicyLossConfig


class Algorithm(Protocol):
    def advantages(self, reward: Tensor, baseline: Tensor) -> Tensor:
        """[B] float32 from reward [B] and baseline [B], the rollout batch of all ranks."""

    def loss_config(self) -> PolicyLossConfig:
        """The policy loss of every update of the run."""


_ALGORITHMS: dict[str, type[Algorithm]] = {"mssr": MSSR, "mvsr": MVSR}


def make_algorithm(config: AlgorithmConfig) -> Algorithm:
    """The algorithm that `algorithm.name` names.

    Raises:
        UserError: no algorithm of that name.
    """
    if config.name not in _ALGORITHMS:
        raise UserError(f"algorithm.name: {config.name!r} is unknown; choose one of {', '.join(_ALGORITHMS)}")
    return _ALGORITHMS[config.name](config)
