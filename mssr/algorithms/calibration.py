"""How well the value tracker predicts: its values from before a step against the rewards of the step."""

import torch
from torch import Tensor

BINS = 10


def calibration(baseline: Tensor, reward: Tensor) -> dict[str, float | list[list[float]]]:
    """Metrics of one step's predictions.

    tracker/brier: mean of (v - r)^2; 0.25 for a tracker that says 0.5 of everything (rewards 0 and 1).
    tracker/bins: for v in [0, .1), [.1, .2), ... [.9, 1], [count, sum of v, sum of r]: sums, so that steps add up.

    Args:
        baseline: [B] in [0, 1], v from before the tracker saw these rewards.
        reward: [B] in [0, 1].
    """
    which = (BINS * baseline).long().clamp(max=BINS - 1)
    columns = torch.stack([torch.ones_like(baseline), baseline, reward], 1).double()
    sums = torch.zeros(BINS, 3, dtype=torch.float64).index_add(0, which, columns)
    return {"tracker/brier": (baseline - reward).double().square().mean().item(), "tracker/bins": sums.tolist()}
