"""Entropy shaping of advantages: "Reasoning with Exploration: An Entropy Perspective", arXiv 2506.14758.

The fused loss (`mssr_kernels.linear_policy_loss`) applies the same formula where it has the entropy at hand. These
functions are for what lies outside it: the kernels' tests, analysis of saved rollouts, other trainers.
"""

from torch import Tensor


def shape(advantage: Tensor, entropy: Tensor, alpha: float, kappa: float) -> Tensor:
    """A + min(alpha * H, |A| / kappa), elementwise; a token with A = 0 stays at 0.

    The addend is never negative. For kappa > 1 it is smaller than |A|, so the sign of A is kept; a smaller kappa can
    flip a negative A, which is why the loss clips by the sign of the result.

    Args:
        advantage: any shape, after normalisation. A per-sequence advantage goes in as [B, 1].
        entropy: [B, R] or whatever broadcasts, >= 0. Detached: shaping weights the gradient, it is no entropy bonus.
    """
    return advantage + (alpha * entropy.detach()).minimum(advantage.abs() / kappa)


def sampled_token_entropy(logp: Tensor) -> Tensor:
    """-p log p of the sampled token alone, the authors' stand-in for the entropy (arXiv 2512.18215, their code).

    One term of the entropy's sum, so at most 1/e = 0.368 (at p = 1/e), and 0 at both ends: a token the policy
    thought very unlikely counts as little as a certain one.

    Args:
        logp: any shape, <= 0. -inf (p = 0) gives 0.
    """
    p = logp.exp()
    return (-p * logp).masked_fill(p == 0, 0.0)
