"""Log-prob, entropy and policy loss fused with the language-model head, for any trainer. torch, and triton on a GPU."""

from . import reference
from .api import linear_logprob_entropy, linear_policy_loss
from .head import FusedLMHead
from .patch import check_patch, next_token_target, patch, unpatch
from .plan import Plan, explain
from .types import LogprobEntropy, PolicyLoss, PolicyLossConfig, PolicyMetrics

__all__ = [
    "FusedLMHead",
    "LogprobEntropy",
    "Plan",
    "PolicyLoss",
    "PolicyLossConfig",
    "PolicyMetrics",
    "check_patch",
    "explain",
    "linear_logprob_entropy",
    "linear_policy_loss",
    "next_token_target",
    "patch",
    "reference",
    "unpatch",
]
