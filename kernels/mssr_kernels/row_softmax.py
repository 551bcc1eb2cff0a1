"""Softmax statistics of rows of logits, and the gradient by the logits formed in their place.

With x = h W^T + b, z = softcap(x) / T, m = max z, s = sum e^(z - m), p = e^(z - m) / s:

    log p_v = (z_v - m) - log s          logp = log p_y          lse = m + log s
    H       = log s - (1/s) sum e^(z - m) (z - m)

and for the upstream gradients a = dL/dlogp, g = dL/dH, l = dL/dlse

    dL/dz_v = a (1[v = y] - p_v) - g p_v (log p_v + H) + l p_v
            = a 1[v = y] + e^(z_v - m) (c1 (z_v - m) + c0),    c1 = -g / s,    c0 = (l - a - g (H - log s)) / s
    dL/dx_v = dL/dz_v (1 - tanh^2(x_v / cap)) / T,             tanh(x_v / cap) = z_v T / cap

Shifting by m before summing keeps +-80 logits exact and makes logp <= 0 and H >= 0 hold in floating point (s >= 1,
because the maximum itself contributes 1). A logit of -inf, which only a bias can make of finite inputs, has
p = 0 and contributes nothing: its 0 * -inf is kept from being formed. NaN propagates.

All is elementwise or row-local, and done in blocks of rows small enough to stay in the cache between the passes: the
logits themselves travel from and to memory once.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Blocks of logits between two passes over them: about the share of the last-level cache one may hope for.
BLOCK_BYTES = {"cpu": 4 << 20, "cuda": 32 << 20}
SCRATCH_BLOCKS = 2
# e^(-1000) is 0 in float32 and float64 alike: a floor under z - m changes nothing but turns -inf into a number.
FLOOR = -1000.0


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


class Scratch:
    """Two blocks of rows beside the logits, for the passes over a block."""

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device, max_bytes: int):
        row_bytes = width * dtype.itemsize
        block_bytes = min(BLOCK_BYTES.get(device.type, BLOCK_BYTES["cuda"]), max_bytes // SCRATCH_BLOCKS)
        self.rows = max(1, block_bytes // row_bytes)
        self.bytes = SCRATCH_BLOCKS * self.rows * row_bytes
        self._shape, self._options = (SCRATCH_BLOCKS, self.rows, width), dict(dtype=dtype, device=device)
        self._blocks = None

    def blocks(self, z: Tensor):
        """Yield (rows, z[rows], scratch, scratch) block by block."""
        if self._blocks is None:
            self._blocks = torch.empty(self._shape, **self._options)
        for start in range(0, z.shape[0], self.rows):
            block = z[start : start + self.rows]
            first, second = self._blocks[:, : block.shape[0], : block.shape[1]]
            yield slice(start, start + block.shape[0]), block, first, second


def finish_logits_(x: Tensor, bias: Tensor | None, temperature: Tensor | float, softcap: float | None):
    """x = h W^T -> z, in place. temperature: [rows, 1] or a number; bias [columns]."""
    if bias is not None:
        x.add_(bias)
    if softcap is not None:
        x.div_(softcap).tanh_().mul_(softcap)
    if isinstance(temperature, Tensor) or temperature != 1:
        x.div_(temperature)


def row_statistics(z, target, bias, temperature, softcap, scratch: Scratch) -> RowStatistics:
    """Statistics of all columns of z [rows, V], which holds h W^T and is turned into the logits."""
    result = RowStatistics(*(torch.empty(z.shape[0], dtype=z.dtype, device=z.device) for _ in RowStatistics._fields))
    for rows, block, shifted, weights in scratch.blocks(z):
        finish_logits_(block, bias, _of_rows(temperature, rows), softcap)
        maximum = block.amax(dim=1, keepdim=True)
        torch.sub(block, maximum, out=shifted)
        if bias is not None:
            shifted.clamp_(min=FLOOR)
        torch.exp(shifted, out=weights)
        total = weights.sum(dim=1)
        log_sum = total.log()
        result.max[rows] = maximum[:, 0]
        result.log_sum[rows] = log_sum
        # From the logits, not from `shifted`: a masked label has log-probability -inf, not the floor.
        result.logp[rows] = (block.gather(1, target[rows, None]) - maximum)[:, 0] - log_sum
        result.entropy[rows] = log_sum - weights.mul_(shifted).sum(dim=1) / total
    return result


def logits_to_gradient_(
    z: Tensor,
    target: Tensor,
    statistics: RowStatistics,
    upstream: UpstreamGradient,
    temperature,
    softcap,
    scratch,
    masked: bool,
    first_column: int = 0,
):
    """Replace the logits z [rows, columns] by dL/dx. Column 0 of z is column `first_column` of the vocabulary.

    masked: there may be logits of -inf. temperature: [rows, 1] or a number.
    """
    zero = torch.zeros_like(statistics.max)
    a, g, l = (zero if field is None else field for field in upstream)
    inverse_sum = torch.exp(-statistics.log_sum)
    c0 = ((l - a - g * (statistics.entropy - statistics.log_sum)) * inverse_sum)[:, None]
    c1 = None if upstream.entropy is None else (-g * inverse_sum)[:, None]
    a, maximum = a[:, None], statistics.max[:, None]
    # A label outside these columns adds zero to some column: no branch, hence no wait for the device.
    label = (target - first_column)[:, None]
    a = a.masked_fill((label < 0) | (label >= z.shape[1]), 0)
    label = label.clamp(0, z.shape[1] - 1)

    for rows, block, spare, slope in scratch.blocks(z):
        t = _of_rows(temperature, rows)
        if softcap is not None:
            torch.mul(block, t / softcap, out=slope)
            slope.square_().neg_().add_(1)
        block.sub_(maximum[rows])
        if c1 is None:
            block.exp_().mul_(c0[rows])
        else:
            if masked:
                block.clamp_(min=FLOOR)
            torch.exp(block, out=spare)
            block.mul_(c1[rows]).add_(c0[rows]).mul_(spare)
        block.scatter_add_(1, label[rows], a[rows])
        if softcap is not None:
            block.mul_(slope)
        if isinstance(t, Tensor) or t != 1:
            block.div_(t)


def _of_rows(temperature: Tensor | float, rows: slice) -> Tensor | float:
    return temperature[rows] if isinstance(temperature, Tensor) else temperature
