"""Log-prob, entropy and policy loss fused with the language-model head, for any trainer. torch, and triton on a GPU."""

from . import reference
from .api import linear_logprob_entropy, linear_policy_loss
from .head import FusedLMHead
from .plan import Plan, explain
from .types import LogprobEntropy, PolicyLoss, PolicyLossConfig, PolicyMetrics

__all__ = [
    "FusedLMHead",
    "LogprobEntropy",
    "Plan",
    "PolicyLoss",
    "PolicyLossConfig",
    "PolicyMetrics",
    "explain",
    "linear_logprob_entropy",
    "linear_policy_loss",
    "reference",
]
