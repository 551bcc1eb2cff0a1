"""The policy loss that the algorithms share. They differ in the advantages that go in, and in whether it shapes them."""

from mssr.config import AlgorithmConfig
from mssr_kernels import PolicyLossConfig


def policy_loss_config(config: AlgorithmConfig, *, shaped: bool) -> PolicyLossConfig:
    """The loss of every update of a run: clipped, dual-clipped, with the KL term and entropy bonus of the configuration.

    shaped: advantages grow with the token's entropy (`shaping.shape`); without, entropy_alpha is 0 whatever is set.
    """
    return PolicyLossConfig(
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip,
        entropy_alpha=config.entropy_alpha if shaped else 0.0,
        entropy_kappa=config.entropy_kappa,
        entropy_source=config.entropy_source,
        kl_coef=config.kl_coef,
        entropy_coef=config.entropy_coef,
        # TIS corrects for recomputed log-probs that differ from the sampler's. With the rollout's own as old
        # log-probs the ratio is already current / sampler: a second weight would count the mismatch twice.
        tis_cap=config.tis_cap if config.old_logp == "recompute" else None,
    )
