"""Passes over a block of logits, [columns, rows], small enough to stay in the cache between them.

A block is turned into softmax weights in place, tile by tile of TILE columns: w = e^(z - maximum of the tile), with maximum
and sum of each (tile, row) kept. The gradient by the logits is then one multiplication by a factor per (tile, row).
`scratch` is a flat tensor of at least the size of the block. `core.statistics` has the mathematics.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ...core.statistics import FLOOR, Partial, PerRow, RowGradient, merge

TILE = 64
# About the share of the last-level cache that is likely free.
BLOCK_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}


def block_columns(rows: int, dtype: torch.dtype, device: torch.device, most_bytes: int) -> int:
    """Return the number of columns of a block of so many rows: a multiple of TILE."""
    block_bytes = min(BLOCK_BYTES.get(device.type, BLOCK_BYTES["cuda"]), most_bytes)
    return TILE * min(max(1, block_bytes // max(1, rows * dtype.itemsize * TILE)), 64)


def row_stride(rows: int, dtype: torch.dtype) -> int:
    """Return the stride with which to store so many rows: GEMMs write lines up to 1.5 times as fast if these begin at
    multiples of 64 bytes. Few rows are not worth the padding."""
    line = 64 // dtype.itemsize
    return rows if rows < 4 * line else -(-rows // line) * line


def finish_logits_(x: Tensor, bias: Tensor | None, temperature: PerRow, softcap: float | None):
    """Turn W h^T into z, in place. bias [columns]."""
    if bias is not None:
        x.add_(bias[:, None])
    if softcap is not None:
        x.div_(softcap).tanh_().mul_(softcap)
    if isinstance(temperature, Tensor) or temperature != 1:
        x.div_(temperature)


def to_weights_(z: Tensor, label: Tensor, masked: bool, scratch: Tensor) -> tuple[Partial, Tensor, Tensor]:
    """Replace z by its weights. Return the sums over the block [rows], and maximum and sum of its tiles [tiles, rows].

    label [rows]: the label's column in the block, or a number outside of it. masked: logits may be -inf.
    """
    rows = z.shape[1]
    inside = (label >= 0) & (label < len(z))
    label_logit = z.gather(0, label.clamp(0, len(z) - 1)[None])[0].masked_fill(~inside, -torch.inf)
    maximum, total, weighted = z.new_empty(3, -(-len(z) // TILE), rows)
    for tiles, panel in _panels(z, TILE):
        shifted = scratch[: panel.numel()].view(panel.shape)
        torch.amax(panel, dim=1, out=maximum[tiles])
        if masked:  # of a fully masked tile, -inf - -inf would be NaN
            maximum[tiles].clamp_(min=torch.finfo(z.dtype).min)
        torch.sub(panel, maximum[tiles, None], out=shifted)
        if masked:
            shifted.clamp_(min=FLOOR)
        torch.exp(shifted, out=panel)
        torch.sum(panel, dim=1, out=total[tiles])
        torch.sum(shifted.mul_(panel), dim=1, out=weighted[tiles])
    return merge(Partial(maximum, total, weighted, label_logit[None])), maximum, total


def to_gradient_(w: Tensor, maximum: Tensor, label: Tensor, rows: RowGradient, scratch: Tensor, tile: int = TILE):
    """Replace the weights of some columns by dL/dx.

    maximum [ceil(columns / tile), rows]: what was subtracted from the logits. label: as for `to_weights_`.
    """
    for tiles, panel in _panels(w, tile):
        log_factor = (maximum[tiles] - rows.max).sub_(rows.log_sum)[:, None]  # log p - log w
        if rows.slope is None and rows.cap_scale is None:
            panel.mul_(log_factor.exp_().mul_(rows.constant))
            continue
        log_p = scratch[: panel.numel()].view(panel.shape)
        torch.log(panel, out=log_p).add_(log_factor).clamp_(min=FLOOR)
        panel.mul_(log_factor.exp_())
        if rows.cap_scale is not None:
            # z / cap = (log p + lse) T / cap; where w is 0, p is 0 and the result does not matter.
            panel.mul_(((log_p + (rows.max + rows.log_sum)) * rows.cap_scale).square_().neg_().add_(1))
        panel.mul_(rows.constant if rows.slope is None else log_p.mul_(rows.slope).add_(rows.constant))
    # A label outside the block adds zero to some column: a branch would wait for the device.
    inside = (label >= 0) & (label < len(w))
    w.scatter_add_(0, label.clamp(0, len(w) - 1)[None], rows.label.masked_fill(~inside, 0)[None])


def _panels(block: Tensor, tile: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield the block as [tiles, tile, rows], and the remainder as a tile of its own."""
    whole, rows = len(block) // tile, block.shape[1]
    if whole:
        yield slice(0, whole), block[: whole * tile].view(whole, tile, rows)
    if len(block) > whole * tile:
        yield slice(whole, whole + 1), block[None, whole * tile :]
