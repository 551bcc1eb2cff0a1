"""Log-probs, entropy and policy loss fused with the language-model head, for any trainer. Needs torch; triton on a GPU."""

from . import reference
from .config import LogprobEntropy, PolicyLoss, PolicyLossConfig, PolicyMetrics
from .head import FusedLMHead
from .loss import linear_logprob_entropy, linear_policy_loss
from .modes.plan import Plan, explain
from .patch import check_patch, next_token_target, patch, unpatch

__version__ = "0.1.0"

__all__ = [
    "FusedLMHead", "LogprobEntropy", "Plan", "PolicyLoss", "PolicyLossConfig", "PolicyMetrics", "check_patch", "explain",
    "linear_logprob_entropy", "linear_policy_loss", "next_token_target", "patch", "reference", "unpatch",
]  # fmt: skip
