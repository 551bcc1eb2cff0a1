"""Metrics of a policy loss under the names of TRL's GRPOTrainer."""

import torch
from accelerate import Accelerator
from torch import Tensor

from mssr.integrations.trl.fused_head import PolicyLossOutput
from mssr_kernels import PolicyLossConfig


def policy_metrics(
    output: PolicyLossOutput, mask: Tensor, config: PolicyLossConfig, accelerator: Accelerator
) -> dict[str, float]:
    """Metrics of one micro-batch over all ranks: means over tokens, and extremes of the sequences' means.

    mask: [B, C], non-zero at the tokens of the loss, which are the last C labels.
    """
    mask = mask.bool()
    ratio, advantage = (value[:, -mask.shape[1] :] for value in (output.ratio, output.shaped_advantage))
    low = (ratio < 1 - config.clip_low) & (advantage < 0) & mask
    high = (ratio > 1 + config.clip_high) & (advantage > 0) & mask
    sums = output.metrics
    clipped = (low.sum(), high.sum(), sums.dual_clipped_sum, sums.log_ratio_capped_sum)
    totals = torch.stack([sums.rows, sums.entropy_sum, *clipped, sums.shaping_sum, sums.kl_sum])
    totals = accelerator.reduce(totals, reduction="sum")
    entropy, low_mean, high_mean, dual, capped, shaping, kl = (totals[1:] / totals[0].clamp(min=1)).tolist()
    tokens = mask.sum(1)
    shares = torch.stack([low.sum(1) / tokens, high.sum(1) / tokens], dim=1)  # NaN for a sequence without tokens
    shares = accelerator.gather(shares)
    shares = shares[~shares.isnan().any(1)]
    metrics = {
        "entropy": entropy,
        "clip_ratio/low_mean": low_mean,
        "clip_ratio/high_mean": high_mean,
        "clip_ratio/region_mean": low_mean + high_mean,
        "clip_ratio/low_min": shares[:, 0].min().item() if len(shares) else float("nan"),
        "clip_ratio/high_max": shares[:, 1].max().item() if len(shares) else float("nan"),
        "clip_ratio/dual_mean": dual,
        "clip_ratio/capped_mean": capped,
        "shaping/mean": shaping,
    }
    return metrics | ({"kl": kl} if config.kl_coef else {})
