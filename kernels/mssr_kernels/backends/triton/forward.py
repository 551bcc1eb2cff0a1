"""Statistics of every row in one pass over the vocabulary, without logits in memory.

A program takes a tile of rows and a part of the vocabulary, one tile of columns after the other. Each tile of logits
yields, while it is still in registers,

    m = max z        s = sum e^(z - m)        t = sum e^(z - m) (z - m)        z_y if y is among the columns

which merge into the running sums of the part (`core.statistics` has the mathematics). The parts go to memory,
[parts, rows], and a second kernel merges them in order: no atomics, and no sum whose order depends on the number of rows.

With a `store` the weights e^(z - m) go to memory as well, vocabulary-major, with m and s of their tiles, so that modes
`exact` and `sparse` need no recomputation for the backward. This does not change a bit of the statistics.

m starts at the lowest finite number. A tile that is all -inf keeps it, with s = t = 0, and has no effect in the merge. A NaN
reaches s and t, and so logp and entropy, even though the maximum ignores it.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.statistics import Partial, PerRow
from .logits_tile import (
    EXACT,
    LOG_FLOOR,
    LOWEST,
    NEGATIVE_INFINITY,
    finish_logits,
    grouped_tile,
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
from .tuning import TileConfig, tiles_per_part

MERGED_ROWS = 128  # rows per program of `merge_kernel`


class Store(NamedTuple):
    """Buffers for the weights of a chunk of C rows, in tiles of `tile_config(...).block_vocab` columns.

    weights [V, C], in the dtype of the operands, has lines of `padded(C)` elements; the padding may be overwritten.
    """

    weights: Tensor
    max: Tensor  # [tiles, C] float32, what was subtracted from the logits
    sum: Tensor  # [tiles, C] float32, of the weights before they are rounded


@triton.jit
def merge_sums(maximum, total, weighted, other_maximum, other_total, other_weighted):
    """Return (m, s, t) of the union of two sets of columns."""
    merged = tl.maximum(maximum, other_maximum)
    # Floored: a bias may mask by the lowest number, a multiple of which is -inf, and -inf times 0 is NaN.
    shift, other_shift = tl.maximum(maximum - merged, LOG_FLOOR), tl.maximum(other_maximum - merged, LOG_FLOOR)
    scale, other_scale = tl.exp(shift), tl.exp(other_shift)
    weighted = scale * (weighted + shift * total) + other_scale * (other_weighted + other_shift * other_total)
    return merged, scale * total + other_scale * other_total, weighted


@triton.jit(do_not_specialize=["rows", "parts", "tiles_of_part"])
def forward_kernel(
    h,  # [rows, width]
    weight,  # [vocab, width]
    bias,  # [vocab] or None
    target,  # [rows] int64
    temperature,  # [rows] float32 or a number
    softcap,  # float32 or None
    sums,  # [4, parts, rows] float32: m, s, t, z_y
    weights,  # [vocab, store_stride] or None
    tile_maximum,  # [tiles, rows] float32 or None
    tile_total,  # as tile_maximum
    rows, vocab, width, h_stride, weight_stride, store_stride, parts, tiles_of_part,
    ROW_TEMPERATURE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_VOCAB: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP_ROWS: tl.constexpr, TMA: tl.constexpr, STORE_TMA: tl.constexpr,
):  # fmt: skip
    """One program per row tile and part of the vocabulary."""
    row_tile, part = grouped_tile(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), parts, GROUP_ROWS)
    first_row = row_tile * BLOCK_ROWS
    row = first_row + tl.arange(0, BLOCK_ROWS)
    inside = row < rows
    scale = row_scale(temperature, row, rows, ROW_TEMPERATURE)
    label_column = tl.load(target + row, mask=inside, other=-1)
    label_column = tl.where((label_column >= 0) & (label_column < vocab), label_column, -1).to(tl.int32)

    maximum = tl.full([BLOCK_ROWS], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    weighted = tl.zeros([BLOCK_ROWS], tl.float32)
    label = tl.full([BLOCK_ROWS], NEGATIVE_INFINITY, tl.float32)
    first_tile = part * tiles_of_part
    for tile in range(first_tile, tl.minimum(first_tile + tiles_of_part, tl.cdiv(vocab, BLOCK_VOCAB))):
        first_column = tile * BLOCK_VOCAB
        product = product_tile(
            h, weight, first_row, first_column, rows, vocab, width, h_stride, weight_stride,
            BLOCK_ROWS, BLOCK_VOCAB, BLOCK_D, TMA,
        )  # fmt: skip
        pieces = quarters(product)
        z = ()
        here_maximum = tl.full([BLOCK_ROWS], LOWEST, tl.float32)
        for i in tl.static_range(4):
            column = first_column + i * (BLOCK_VOCAB // 4) + tl.arange(0, BLOCK_VOCAB // 4)
            piece = finish_logits(pieces[i], column, vocab, bias, softcap, scale)
            here_maximum = tl.maximum(here_maximum, tl.max(piece, axis=1))
            is_label = column[None, :] == label_column[:, None]
            label = tl.maximum(label, tl.max(tl.where(is_label, piece, NEGATIVE_INFINITY), axis=1))
            z += (piece,)
        here_total = tl.zeros([BLOCK_ROWS], tl.float32)
        here_weighted = tl.zeros([BLOCK_ROWS], tl.float32)
        for i in tl.static_range(4):
            shifted = z[i] - here_maximum[:, None]
            w = tl.exp(shifted)
            here_total += tl.sum(w, axis=1)
            # Where the floor takes effect, w is 0, or NaN and stays NaN.
            here_weighted += tl.sum(w * tl.maximum(shifted, LOG_FLOOR), axis=1)
            if weights is not None:
                here = first_column + i * (BLOCK_VOCAB // 4)
                store_transposed(weights, w, here, first_row, vocab, store_stride, STORE_TMA)
        if weights is not None:
            at = tl.cast(tile, tl.int64) * rows + row
            tl.store(tile_maximum + at, here_maximum, mask=inside)
            tl.store(tile_total + at, here_total, mask=inside)
        maximum, total, weighted = merge_sums(maximum, total, weighted, here_maximum, here_total, here_weighted)

    at = part.to(tl.int64) * rows + row
    field = parts.to(tl.int64) * rows
    tl.store(sums + at, maximum, mask=inside)
    tl.store(sums + field + at, total, mask=inside)
    tl.store(sums + 2 * field + at, weighted, mask=inside)
    tl.store(sums + 3 * field + at, label, mask=inside)


@triton.jit(do_not_specialize=["rows", "parts"])
def merge_kernel(
    sums,  # [4, parts, rows] float32
    merged,  # [4, rows] float32
    rows, parts, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_ROWS rows."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < rows
    maximum = tl.full([BLOCK_ROWS], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    weighted = tl.zeros([BLOCK_ROWS], tl.float32)
    label = tl.full([BLOCK_ROWS], NEGATIVE_INFINITY, tl.float32)
    at, field = sums + row, parts.to(tl.int64) * rows
    for _ in range(parts):
        other_maximum = tl.load(at, mask=inside, other=0)
        other_total = tl.load(at + field, mask=inside, other=0)
        other_weighted = tl.load(at + 2 * field, mask=inside, other=0)
        label = tl.maximum(label, tl.load(at + 3 * field, mask=inside, other=0))
        maximum, total, weighted = merge_sums(maximum, total, weighted, other_maximum, other_total, other_weighted)
        at += rows
    tl.store(merged + row, maximum, mask=inside)
    tl.store(merged + rows + row, total, mask=inside)
    tl.store(merged + 2 * rows + row, weighted, mask=inside)
    tl.store(merged + 3 * rows + row, label, mask=inside)


def statistics(
    h: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, temperature: PerRow, softcap: float | None,
    store: Store | None = None,
) -> Partial:  # fmt: skip
    """Return the sums over the vocabulary, each [N] float32, of h [N, D] and weight [V, D].

    target [N] int64: a column of this weight; outside [0, V) the label's logit is -inf.
    """
    tiles = tile_config(weight, bias, softcap)
    rows, vocab = h.shape[0], weight.shape[0]
    of_part = tiles_per_part(vocab, tiles.block_vocab)
    parts = triton.cdiv(triton.cdiv(vocab, tiles.block_vocab), of_part)
    sums = torch.empty(4, parts, rows, dtype=torch.float32, device=h.device)
    merged = torch.empty(4, rows, dtype=torch.float32, device=h.device)
    if rows:
        with on(h.device):
            forward_kernel[(triton.cdiv(rows, tiles.block_rows) * parts,)](
                bias=bias, target=target, softcap=softcap and float(softcap), sums=sums, parts=parts, tiles_of_part=of_part,
                **_store_arguments(store, tiles), **operands(h, weight, tiles), **row_temperature(temperature),
            )  # fmt: skip
            merge_kernel[(triton.cdiv(rows, MERGED_ROWS),)](sums, merged, rows, parts, BLOCK_ROWS=MERGED_ROWS, **EXACT)
    return Partial(*merged)


def _store_arguments(store: Store | None, tiles: TileConfig) -> dict:
    if store is None:
        return dict(weights=None, tile_maximum=None, tile_total=None, store_stride=0, STORE_TMA=False)
    weights, stride = transposed_target(store.weights, tiles), store.weights.stride(0)
    by_tma = weights is not store.weights
    return dict(weights=weights, tile_maximum=store.max, tile_total=store.sum, store_stride=stride, STORE_TMA=by_tma)
