"""What the public functions take and return: the loss configuration and the result tuples."""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class PolicyLossConfig:
    """Constants of the policy loss. Validated on construction (ValueError).

    The defaults are MSSR's objective, with entropy shaping and dual clip. `PolicyLossConfig.ppo()` has neither.

    clip_low, clip_high   the ratio is clipped to [1 - clip_low, 1 + clip_high]
    dual_clip             where A' < 0 the objective is at least dual_clip * A' (> 1); None switches it off
    entropy_alpha, entropy_kappa
                          shaping: A' = A + min(alpha * H, |A| / kappa) (arXiv 2506.14758); alpha 0 switches it off
    entropy_source        H is the "exact" entropy of the policy, or "sampled_token": -p log p of the sampled token
                          alone, as in the code of arXiv 2512.18215. The two give different learning curves.
                          An explicit `shaping_entropy` argument takes precedence.
    kl_coef, kl_estimator weight of the KL divergence from the reference policy, estimated by k3: e^d - d - 1
    entropy_coef          weight of an entropy bonus, the only term with a gradient through H
    tis_cap               cap of the truncated importance weight trainer/sampler; None switches it off
    log_ratio_cap         log-ratios are clamped to [-cap, cap] before they are exponentiated: logp - old_logp, and
                          d = ref_logp - logp of k3. A clamped term is constant: no gradient. At most 80, e^80 being
                          finite in float32. `PolicyMetrics.log_ratio_capped_sum` counts the rows.
    """

    clip_low: float = 0.2
    clip_high: float = 0.3
    dual_clip: float | None = 3.0
    entropy_alpha: float = 0.4
    entropy_kappa: float = 2.0
    entropy_source: Literal["exact", "sampled_token"] = "exact"
    kl_coef: float = 0.0
    kl_estimator: Literal["k3"] = "k3"
    entropy_coef: float = 0.0
    tis_cap: float | None = None
    log_ratio_cap: float = 20.0

    @classmethod
    def ppo(cls, clip_low: float = 0.2, clip_high: float = 0.2, **changes: Any) -> "PolicyLossConfig":
        """Return PPO's clipped objective (arXiv 1707.06347): no entropy shaping, no dual clip. changes: other fields."""
        return cls(clip_low=clip_low, clip_high=clip_high, **{"dual_clip": None, "entropy_alpha": 0.0, **changes})

    def __post_init__(self):
        def require(name: str, holds: bool, rule: str):
            if not holds:
                raise ValueError(f"PolicyLossConfig.{name} must be {rule}, got {getattr(self, name)!r}")

        # Comparisons are written so that NaN fails them.
        require("clip_low", 0 <= self.clip_low <= 1, "in [0, 1]")
        require("clip_high", 0 <= self.clip_high < math.inf, "a finite number >= 0")
        require("dual_clip", self.dual_clip is None or 1 < self.dual_clip < math.inf, "a finite number > 1, or None")
        require("entropy_alpha", 0 <= self.entropy_alpha < math.inf, "a finite number >= 0")
        require("entropy_kappa", 0 < self.entropy_kappa < math.inf, "a finite number > 0")
        require("entropy_source", self.entropy_source in ("exact", "sampled_token"), "'exact' or 'sampled_token'")
        require("kl_coef", 0 <= self.kl_coef < math.inf, "a finite number >= 0")
        require("kl_estimator", self.kl_estimator == "k3", "'k3' (the only estimator there is)")
        require("entropy_coef", math.isfinite(self.entropy_coef), "a finite number")
        require("tis_cap", self.tis_cap is None or 0 < self.tis_cap < math.inf, "a finite number > 0, or None")
        require("log_ratio_cap", 0 < self.log_ratio_cap <= 80, "in (0, 80]")


class LogprobEntropy(NamedTuple):
    """Per token, each [N] float32 and zero for ignored rows. All three carry gradient."""

    logp: Tensor  # log-probability of the target
    entropy: Tensor  # of the whole next-token distribution, in nats
    lse: Tensor  # log-sum-exp of the logits after softcap and temperature


class PolicyMetrics(NamedTuple):
    """Sums over the rows not ignored, 0-d float32 without gradient.

    Sums, so that micro-batches and ranks can add them up (`ratio_max`: take the maximum) and divide by `rows`.
    """

    rows: Tensor  # number of rows not ignored
    policy_loss_sum: Tensor  # clipped, TIS-weighted policy term
    kl_sum: Tensor  # k3 estimate, before kl_coef; 0 without ref_logp
    entropy_sum: Tensor  # exact entropy of the current policy
    clipped_sum: Tensor  # rows at the bound of [1 - clip_low, 1 + clip_high]
    dual_clipped_sum: Tensor  # rows at the bound dual_clip * A'
    ratio_sum: Tensor
    ratio_max: Tensor  # 0 when there are no rows
    tis_weight_sum: Tensor  # equals rows when TIS is off
    shaping_sum: Tensor  # min(alpha * H, |A| / kappa)
    log_ratio_capped_sum: Tensor  # rows with a log-ratio beyond +-log_ratio_cap


class PolicyLoss(NamedTuple):
    """Result of `linear_policy_loss`. Only `loss` carries gradient; ignored rows hold zeros (False)."""

    loss: Tensor  # 0-d float32
    logp: Tensor  # [N] float32, current policy
    entropy: Tensor  # [N] float32, current policy, exact
    advantage: Tensor  # [N] float32, the shaped advantage A'
    ratio: Tensor  # [N] float32, exp(logp - old_logp), the log-ratio clamped by log_ratio_cap
    clipped: Tensor  # [N] bool, clipped or dual-clipped: the row's policy term has no gradient
    metrics: PolicyMetrics
