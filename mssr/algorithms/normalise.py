"""Normalisation of advantages over the rollout batch (arXiv 2512.18215)."""

import torch
from torch import Tensor


def batch_normalise(advantage: Tensor) -> Tensor:
    """(A - mean) / std over all sequences given, with the biased variance.

    One sequence, or a batch whose advantages are all equal, says nothing about which response was better: zeros.
    A NaN among the inputs stays visible: everything becomes NaN.

    Args:
        advantage: [B], the sequences of all ranks (a rank's own share would be normalised by its own luck).

    Returns:
        [B], the dtype of `advantage`.
    """
    # Subtracting the first element changes nothing but the rounding: equal advantages give a std of exactly 0,
    # where the mean of B equal numbers can be an ulp off and would turn rounding noise into advantages of +-1.
    shifted = (advantage - advantage[:1]).double()
    centred = shifted - shifted.mean()
    std = centred.square().mean().sqrt()
    return torch.where(std == 0, torch.zeros_like(centred), centred / std).to(advantage.dtype)
