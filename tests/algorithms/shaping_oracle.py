"""Entropy shaping of advantages by its formula (arXiv 2506.14758), which the fused loss applies."""

from torch import Tensor


def shape(advantage: Tensor, entropy: Tensor, alpha: float, kappa: float) -> Tensor:
    """Return A + min(alpha * H, |A| / kappa), elementwise."""
    return advantage + (alpha * entropy).minimum(advantage.abs() / kappa)
