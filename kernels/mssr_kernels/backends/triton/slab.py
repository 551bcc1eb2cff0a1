"""dL/dx of a slab of columns, recomputed from the hidden states, for mode `recompute`.

The product has the bits of the forward's, so that p = e^(z - m - log s) fits the known statistics. Only the slab's gradient,
[columns, rows] in the dtype of the operands, goes to memory: two plain products turn it into dH and dW. `RowGradient` has
the formula.
"""

import triton
import triton.language as tl
from torch import Tensor

from ...core.statistics import PerRow, RowGradient
from .logits_tile import (
    finish_logits,
    gradient_arguments,
    grouped_tile,
    logit_gradient,
    on,
    operands,
    product_tile,
    quarters,
    row_scale,
    row_temperature,
    store_transposed,
    tile_config,
    transposed_target,
)


@triton.jit(do_not_specialize=["rows", "first_of_slab"])
def slab_kernel(
    h,  # [rows, width]
    weight,  # [vocab, width], the slab's rows
    bias,  # [vocab] or None
    temperature,  # [rows] float32 or a number
    softcap,  # float32 or None
    target,  # [rows] int64, and the other fields of RowGradient, float32 or None
    maximum, log_sum, label, constant, slope, cap_scale,
    out,  # [vocab, out_stride]
    rows, vocab, width, h_stride, weight_stride, out_stride, first_of_slab,
    ROW_TEMPERATURE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_VOCAB: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP_ROWS: tl.constexpr, TMA: tl.constexpr, STORE_TMA: tl.constexpr,
):  # fmt: skip
    """One program per row tile and vocabulary tile."""
    row_tile, tile = grouped_tile(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(vocab, BLOCK_VOCAB), GROUP_ROWS)
    first_row = row_tile * BLOCK_ROWS
    first_column = tile * BLOCK_VOCAB
    product = product_tile(
        h, weight, first_row, first_column, rows, vocab, width, h_stride, weight_stride,
        BLOCK_ROWS, BLOCK_VOCAB, BLOCK_D, TMA,
    )  # fmt: skip
    row = first_row + tl.arange(0, BLOCK_ROWS)
    inside = row < rows
    scale = row_scale(temperature, row, rows, ROW_TEMPERATURE)
    row_maximum = tl.load(maximum + row, mask=inside, other=0)
    row_log_sum = tl.load(log_sum + row, mask=inside, other=0)
    pieces = quarters(product)
    for i in tl.static_range(4):
        here = first_column + i * (BLOCK_VOCAB // 4)
        column = here + tl.arange(0, BLOCK_VOCAB // 4)
        z = finish_logits(pieces[i], column, vocab, bias, softcap, scale)
        # Not z - lse: the difference from the maximum is exact near it.
        log_p = z - row_maximum[:, None] - row_log_sum[:, None]
        dx = logit_gradient(
            tl.exp(log_p), log_p, z, (first_of_slab + column)[None, :], row[:, None], inside[:, None],
            target, label, constant, slope, cap_scale,
        )  # fmt: skip
        store_transposed(out, dx, here, first_row, vocab, out_stride, STORE_TMA)


def slab_gradient(
    h: Tensor, weight: Tensor, bias: Tensor | None, columns: slice, gradient: RowGradient, temperature: PerRow,
    softcap: float | None, out: Tensor,
):  # fmt: skip
    """Write dL/dx of these columns to `out` [columns, N], in the dtype of the operands.

    h [N, D]; weight [V, D] and bias [V]; fields of `gradient` [N], its target a column of the whole weight. Lines of `out`
    are best `padded(N)` long; the padding may be overwritten.
    """
    if h.shape[0] == 0:
        return
    tiles = tile_config(weight, bias, softcap)
    first = columns.indices(weight.shape[0])[0]
    slab = weight[columns]
    target = transposed_target(out, tiles)
    with on(h.device):
        slab_kernel[(triton.cdiv(h.shape[0], tiles.block_rows) * triton.cdiv(slab.shape[0], tiles.block_vocab),)](
            bias=None if bias is None else bias[columns], softcap=softcap and float(softcap), first_of_slab=first,
            out=target, out_stride=out.stride(0), STORE_TMA=target is not out,
            **operands(h, slab, tiles), **row_temperature(temperature), **gradient_arguments(gradient),
        )  # fmt: skip
