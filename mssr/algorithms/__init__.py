"""Algorithms: how rewards become advantages, and which loss the policy takes a step on.

One file an algorithm. `shaping`, `normalise`, `groups`, `loss` and `value_tracker` hold the pure functions they are
made of, `outcomes` what they are given.
"""

from typing import ClassVar, Protocol

from torch import Tensor

from mssr.algorithms.grpo import GRPO
from mssr.algorithms.mssr import MSSR
from mssr.algorithms.mvsr import MVSR
from mssr.algorithms.outcomes import Outcomes
from mssr.algorithms.reinforce_pp import ReinforcePP
from mssr.algorithms.rloo import RLOO
from mssr.algorithms.spo import SPO
from mssr.config import AlgorithmConfig
from mssr.errors import UserError
from mssr_kernels import PolicyLossConfig


class Algorithm(Protocol):
    """tracked: its baseline is the value tracker's, so `Outcomes.baseline` must be there."""

    tracked: ClassVar[bool]

    def advantages(self, outcomes: Outcomes) -> Tensor:
        """[B] float32, one advantage a response, in the order of `outcomes`."""

    def loss_config(self) -> PolicyLossConfig:
        """The policy loss of every update of the run."""


_ALGORITHMS: dict[str, type[Algorithm]] = {
    "mssr": MSSR,
    "mvsr": MVSR,
    "spo": SPO,
    "grpo": GRPO,
    "rloo": RLOO,
    "reinforce_pp": ReinforcePP,
}


def make_algorithm(config: AlgorithmConfig) -> Algorithm:
    """The algorithm that `algorithm.name` names.

    Raises:
        UserError: no algorithm of that name.
    """
    if config.name not in _ALGORITHMS:
        raise UserError(f"algorithm.name: {config.name!r} is unknown; choose one of {', '.join(_ALGORITHMS)}")
    return _ALGORITHMS[config.name](config)
