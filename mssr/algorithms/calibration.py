"""Calibration of the value tracker: its predictions before a step against the rewards of the step."""

import torch
from torch import Tensor

BINS = 10


def calibration(baseline: Tensor, reward: Tensor) -> dict[str, float | list[list[float]]]:
    """Return the metrics of one step.

    tracker/brier: mean of (v - r)^2; 0.25 for a tracker that always predicts 0.5 (rewards 0 and 1).
    tracker/bins: for v in [0, .1), [.1, .2), ... [.9, 1], [count, sum of v, sum of r]; sums, so that steps can be added.

    baseline: [B] in [0, 1], v before the tracker saw these rewards.
    reward: [B] in [0, 1].
    """
    which = (BINS * baseline).long().clamp(max=BINS - 1)
    columns = torch.stack([torch.ones_like(baseline), baseline, reward], 1).double()
    sums = torch.zeros(BINS, 3, dtype=torch.float64).index_add(0, which, columns)
    return {"tracker/brier": (baseline - reward).double().square().mean().item(), "tracker/bins": sums.tolist()}
