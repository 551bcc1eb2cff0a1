"""Log-prob, entropy and policy loss fused with the language-model head. Drops into any trainer; needs torch only."""

from . import reference
from .api import linear_logprob_entropy, linear_policy_loss
from .head import FusedLMHead
from .types import LogprobEntropy, PolicyLoss, PolicyLossConfig, PolicyMetrics

__all__ = [
    "FusedLMHead",
    "LogprobEntropy",
    "PolicyLoss",
    "PolicyLossConfig",
    "PolicyMetrics",
    "linear_logprob_entropy",
    "linear_policy_loss",
    "reference",
]
