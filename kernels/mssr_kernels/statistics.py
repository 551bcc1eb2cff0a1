"""What is known of a row of logits once every column was seen, and what its gradient needs of that. All of it is [rows].

With x = h W^T + b, z = softcap(x) / T, m = max z, s = sum e^(z - m), t = sum e^(z - m) (z - m), p = e^(z - m) / s:

    logp = z_y - m - log s          lse = m + log s          H = log s - t / s

(m, s, t) of several sets of columns merge into those of their union; `merge` serves tiles of the vocabulary, splits of
it and ranks that hold a shard each. Shifting by m before summing keeps +-80 logits exact and makes logp <= 0 and H >= 0
hold in floating point: s >= 1, because the maximum itself contributes 1, and t <= 0.

For the upstream gradients a = dL/dlogp, g = dL/dH, l = dL/dlse

    dL/dz_v = a (1[v = y] - p_v) - g p_v (log p_v + H) + l p_v
            = a 1[v = y] + p_v (c0 + c1 log p_v),               c0 = l - a - g H,    c1 = -g
    dL/dx_v = dL/dz_v (1 - tanh^2(x_v / cap)) / T,              tanh(x_v / cap) = z_v T / cap

A logit of -inf, which only a bias can make of finite inputs, has p = 0 and contributes nothing. NaN propagates.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# e^(-1000) is 0 in float32 and float64 alike: a floor under z - m changes nothing but turns -inf into a number.
FLOOR = -1000.0


class Partial(NamedTuple):
    """Sums over some of the columns, each [rows], or [parts, rows] for several sets of columns."""

    max: Tensor
    sum: Tensor  # of e^(z - max)
    weighted: Tensor  # of e^(z - max) (z - max)
    label: Tensor  # z_y, or -inf where the label is not among these columns


class RowStatistics(NamedTuple):
    """Each [rows]."""

    max: Tensor
    log_sum: Tensor  # log of the sum of e^(z - max)
    logp: Tensor
    entropy: Tensor

    @property
    def lse(self) -> Tensor:
        return self.max + self.log_sum

    def take(self, rows: Tensor) -> "RowStatistics":
        return RowStatistics(*(field[rows] for field in self))


class UpstreamGradient(NamedTuple):
    """dL/dlogp, dL/dH and dL/dlse of each row, each [rows]; None means zero."""

    logp: Tensor | None
    entropy: Tensor | None = None
    lse: Tensor | None = None

    def take(self, rows: Tensor) -> "UpstreamGradient":
        return UpstreamGradient(*(None if field is None else field[rows] for field in self))

    def nonzero_rows(self) -> Tensor:
        """Row numbers with any coefficient other than zero, NaN included."""
        return torch.stack([field != 0 for field in self if field is not None]).any(dim=0).nonzero()[:, 0]


class RowGradient(NamedTuple):
    """dL/dx_v = label 1[v = y] + p_v (constant + slope log p_v) (1 - (z_v cap_scale)^2), each [rows].

    The temperature and, for the label, the derivative of the softcap are contained in the coefficients.
    """

    target: Tensor  # int64, column of the label; outside [0, V) on a rank that does not hold it
    max: Tensor
    log_sum: Tensor
    label: Tensor
    constant: Tensor
    slope: Tensor | None  # None: no gradient through the entropy
    cap_scale: Tensor | None  # T / cap; None: no softcap

    def take(self, rows: Tensor) -> "RowGradient":
        return RowGradient(*(None if field is None else field[rows] for field in self))


def merge(parts: Partial) -> Partial:
    """[parts, rows] -> [rows]."""
    maximum = parts.max.amax(dim=0)
    shift = (parts.max - maximum).clamp_(min=FLOOR)
    scale = shift.exp()
    weighted = (shift * parts.sum).add_(parts.weighted).mul_(scale).sum(dim=0)
    return Partial(maximum, scale.mul_(parts.sum).sum(dim=0), weighted, parts.label.amax(dim=0))


def row_statistics(total: Partial) -> RowStatistics:
    """From the sums over the whole vocabulary."""
    log_sum = total.sum.log()
    # Not from a floored difference: a masked label has log-probability -inf.
    return RowStatistics(total.max, log_sum, total.label - total.max - log_sum, log_sum - total.weighted / total.sum)


def row_gradient(
    target: Tensor,
    statistics: RowStatistics,
    upstream: UpstreamGradient,
    temperature: Tensor | float,
    softcap: float | None,
) -> RowGradient:
    """temperature: [rows] or a number."""
    zero = torch.zeros_like(statistics.max)
    a, g, l = (zero if field is None else field for field in upstream)
    label, constant = a / temperature, (l - a - g * statistics.entropy) / temperature
    slope = None if upstream.entropy is None else -g / temperature
    cap_scale = None
    if softcap is not None:
        cap_scale = torch.full_like(statistics.max, 1 / softcap) * temperature
        label = label * (1 - ((statistics.logp + statistics.lse) * cap_scale) ** 2)
    return RowGradient(target, statistics.max, statistics.log_sum, label, constant, slope, cap_scale)
