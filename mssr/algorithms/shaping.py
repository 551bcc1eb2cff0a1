"""Entropy shaping of advantages: "Reasoning with Exploration: An Entropy Perspective", arXiv 2506.14758.

The fused loss (`mssr_kernels.linear_policy_loss`) applies the same formula. These functions are for use outside of it:
metrics, tests, analysis of saved rollouts, other trainers.
"""

from torch import Tensor


def shape(advantage: Tensor, entropy: Tensor, alpha: float, kappa: float) -> Tensor:
    """Return A + min(alpha * H, |A| / kappa), elementwise; A = 0 stays 0.

    The added term is never negative. For kappa > 1 it is smaller than |A|, so the sign of A is kept. A smaller kappa can
    flip a negative A, so the loss clips by the sign of the result.

    advantage: any shape, after normalisation; [B, 1] for a per-sequence advantage.
    entropy: >= 0, broadcastable. Detached: shaping weights the gradient; it is not an entropy bonus.
    """
    return advantage + (alpha * entropy.detach()).minimum(advantage.abs() / kappa)


def sampled_token_entropy(logp: Tensor) -> Tensor:
    """Return -p log p of the sampled token, the authors' proxy for the entropy (code of arXiv 2512.18215).

    It is one term of the entropy's sum: at most 1/e = 0.368 (at p = 1/e), and 0 both for a very unlikely and for a certain
    token.

    logp: any shape, <= 0. -inf (p = 0) gives 0.
    """
    p = logp.exp()
    return (-p * logp).masked_fill(p == 0, 0.0)
