"""The statistics of a row of logits, and the coefficients of its gradient. All of them are [rows].

With x = h W^T + b, z = softcap(x) / T, m = max z, s = sum e^(z - m), t = sum e^(z - m) (z - m), p = e^(z - m) / s:

    logp = z_y - m - log s          lse = m + log s          H = log s - t / s

(m, s, t) of several sets of columns merge into those of their union; `merge` serves tiles, slabs and shards of the
vocabulary. Shifting by m before summing keeps logits of +-80 exact and makes logp <= 0 and H >= 0 hold in floating point:
s >= 1, because the maximum itself contributes 1, and t <= 0.

For the upstream gradients a = dL/dlogp, g = dL/dH, l = dL/dlse

    dL/dz_v = a (1[v = y] - p_v) - g p_v (log p_v + H) + l p_v
            = a 1[v = y] + p_v (c0 + c1 log p_v),               c0 = l - a - g H,    c1 = -g
    dL/dx_v = dL/dz_v (1 - tanh^2(x_v / cap)) / T,              tanh(x_v / cap) = z_v T / cap

A logit of -inf, which needs a bias of -inf, has p = 0 and contributes nothing. NaN propagates.
"""

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

# e^(-1000) is 0 in float32 and in float64: clamping z - m at -1000 changes no sum, and avoids 0 * -inf.
FLOOR = -1000.0

PerRow = Tensor | float  # [rows], or a number for all of them


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


class UpstreamGradient(NamedTuple):
    """dL/dlogp, dL/dH and dL/dlse of each row, each [rows]; None means zero."""

    logp: Tensor | None
    entropy: Tensor | None = None
    lse: Tensor | None = None

    def nonzero_rows(self) -> Tensor:
        """Return the row numbers with any coefficient other than zero, NaN included."""
        return torch.stack([field != 0 for field in self if field is not None]).any(dim=0).nonzero()[:, 0]


class RowGradient(NamedTuple):
    """dL/dx_v = label 1[v = y] + p_v (constant + slope log p_v) (1 - (z_v cap_scale)^2), each [rows].

    The coefficients include the temperature and, for the label, the derivative of the softcap.
    """

    target: Tensor  # int64, column of the label; outside [0, V) on a rank that does not hold it
    max: Tensor
    log_sum: Tensor
    label: Tensor
    constant: Tensor
    slope: Tensor | None  # None: no gradient through the entropy
    cap_scale: Tensor | None  # T / cap; None: no softcap


Rows = TypeVar("Rows", RowStatistics, UpstreamGradient, RowGradient)


def take(fields: Rows, rows: Tensor) -> Rows:
    """Return the fields of the given rows."""
    return type(fields)(*(None if field is None else field[rows] for field in fields))


def merge(parts: Partial) -> Partial:
    """Return the sums over all parts: [parts, rows] -> [rows]."""
    maximum = parts.max.amax(dim=0)
    shift = (parts.max - maximum).clamp_(min=FLOOR)
    scale = shift.exp()
    weighted = (shift * parts.sum).add_(parts.weighted).mul_(scale).sum(dim=0)
    return Partial(maximum, scale.mul_(parts.sum).sum(dim=0), weighted, parts.label.amax(dim=0))


def row_statistics(total: Partial) -> RowStatistics:
    """Return the statistics that follow from the sums over the whole vocabulary."""
    log_sum = total.sum.log()
    # Not from a floored difference: a masked label has log-probability -inf.
    return RowStatistics(total.max, log_sum, total.label - total.max - log_sum, log_sum - total.weighted / total.sum)


def row_gradient(
    target: Tensor, statistics: RowStatistics, upstream: UpstreamGradient, temperature: PerRow,
    softcap: float | None,
) -> RowGradient:  # fmt: skip
    """Return the coefficients of dL/dx. target: columns of this rank's weight."""
    zero = torch.zeros_like(statistics.max)
    a, g, l = (zero if field is None else field for field in upstream)
    label, constant = a / temperature, (l - a - g * statistics.entropy) / temperature
    slope = None if upstream.entropy is None else -g / temperature
    cap_scale = None
    if softcap is not None:
        cap_scale = torch.full_like(statistics.max, 1 / softcap) * temperature
        label = label * (1 - ((statistics.logp + statistics.lse) * cap_scale) ** 2)
    return RowGradient(target, statistics.max, statistics.log_sum, label, constant, slope, cap_scale)
