"""MSSR: stable single-rollout RL (arXiv 2512.18215). METHOD "One step".

    A   = r - v                          one response a prompt, v from the value tracker
    A   = (A - mean) / std               over the rollout batch
    A'  = A + min(alpha * H, |A| / kappa)   per token, inside the fused loss

This file holds the first two lines. The third needs every token's entropy, which exists only where the logits do:
`linear_policy_loss` applies it, and `loss_config` tells it how (`shaping.shape` is the same formula, for tests).
"""

from dataclasses import dataclass

from torch import Tensor

from mssr.algorithms.normalise import batch_normalise
from mssr.config import AlgorithmConfig
from mssr_kernels import PolicyLossConfig


@dataclass(frozen=True)
class MSSR:
    config: AlgorithmConfig

    def advantages(self, reward: Tensor, baseline: Tensor) -> Tensor:
        """[B] float32 from reward [B] and baseline [B], the rollout batch of all ranks.

        The baseline is the tracker's value from *before* it saw these rewards.
        """
        return batch_normalise(reward - baseline)

    def loss_config(self) -> PolicyLossConfig:
        config = self.config
        return PolicyLossConfig(
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
            entropy_alpha=config.entropy_alpha,
            entropy_kappa=config.entropy_kappa,
            entropy_source=config.entropy_source,
            kl_coef=config.kl_coef,
            entropy_coef=config.entropy_coef,
            # TIS corrects for recomputed log-probs that differ from the sampler's. With the rollout's own as old
            # log-probs the ratio is already current / sampler: a second weight would count the mismatch twice.
            tis_cap=config.tis_cap if config.old_logp == "recompute" else None,
        )
