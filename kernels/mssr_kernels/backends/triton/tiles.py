"""The softmax weights of a chunk of tokens for modes `exact` and `sparse`, with the passes over them as Triton kernels.

The fused forward stores w = e^(z - m) for every tile of the vocabulary, with m and s of each (tile, row): [V, C] in the
dtype of the operands, so 2 bytes per logit with a 16-bit head. Then p = w e^(m - max - log_sum), and each pass below reads
these weights once, or reads and writes them once.

Rows without a gradient are removed in place: of the first k slots, those whose row is not wanted take wanted rows from the
slots behind. A slot is then read from itself or from a slot that is not written, whatever the order of the programs, and the
first k columns of the buffer are the operand of the products: no second [V, C].

No pass waits for the device, and no result depends on the order of programs: the one atomic is a minimum of integers, and
sums are of partial sums in a fixed order.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.inputs import HeadInputs
from ...core.statistics import Partial, PerRow, RowGradient, RowStatistics, take
from ..base import Tiles
from ..matmul import ALIGNED, HeadMatmul, padded
from .forward import Store, statistics
from .logits_tile import EXACT, INTERPRETED, LOG_FLOOR, gradient_arguments, logit_gradient, on, tile_config
from .tuning import VOCABULARY_PARTS, tiles_per_part

# Block of a pass; its columns divide the vocabulary tile of every table entry. Large in the interpreter, slow per program.
BLOCK_COLUMNS, BLOCK_ROWS = (512, 512) if INTERPRETED.value else (32, 128)
PIECE_COLUMNS = 4096  # of the compact gradient: enough to fill a product
# 1 / this of the workspace is for the rows of the weight that a piece gathers, with their gradients.
GATHERED_SHARE = 4


@triton.jit
def log_factor(tile_maximum, maximum, log_sum, tile, row, slot, inside, rows):
    """Return log p - log w of a row of the chunk in a tile; `slot` has its statistics. tile and row broadcast."""
    m = tl.load(tile_maximum + tl.cast(tile, tl.int64) * rows + row, mask=inside, other=0)
    return m - tl.load(maximum + slot, mask=inside, other=0) - tl.load(log_sum + slot, mask=inside, other=0)


@triton.jit(do_not_specialize=["rows", "slots", "columns"])
def gradient_kernel(
    weights,  # [V, stride]
    tile_maximum,  # [tiles, rows] float32
    column_of,  # [columns] int64: the columns wanted, or None: all
    row_of,  # [slots] int64: the row for each slot of the result, or None: the same
    target,  # [slots] int64, and the other fields of RowGradient, float32 or None
    maximum, log_sum, label, constant, slope, cap_scale,
    out,  # [columns, out_stride]; or `weights`, if no slot takes a row that another slot overwrites
    rows, slots, columns, stride, out_stride,
    TILE: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[:, None]
    slot = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[None, :]
    inside = slot < slots
    column = place
    tile = tl.program_id(0) // (TILE // BLOCK_COLUMNS)
    if column_of is not None:
        column = tl.load(column_of + place, mask=place < columns, other=0).to(tl.int32)
        tile = column // TILE
    row = slot
    touched = slot < stride  # the padding too: whole vectors
    if row_of is not None:
        row = tl.load(row_of + slot, mask=inside, other=0).to(tl.int32)
        touched = inside
    touched = touched & (place < columns)

    w = tl.load(weights + column.to(tl.int64) * stride + row, mask=touched, other=0).to(tl.float32)
    shift = log_factor(tile_maximum, maximum, log_sum, tile, row, slot, inside, rows)
    log_p = tl.maximum(tl.log(w) + shift, LOG_FLOOR)
    lse = tl.load(maximum + slot, mask=inside, other=0) + tl.load(log_sum + slot, mask=inside, other=0)
    p = w * tl.exp(shift)
    dx = logit_gradient(p, log_p, log_p + lse, column, slot, inside, target, label, constant, slope, cap_scale)
    tl.store(out + place.to(tl.int64) * out_stride + slot, dx.to(out.dtype.element_ty), mask=touched)


@triton.jit(do_not_specialize=["rows"])
def first_ranks_kernel(
    weights,  # [vocab, stride]
    tile_maximum,  # [tiles, rows] float32
    maximum, log_sum, cut,  # [rows] float32
    ranks,  # [rows] int64
    first,  # [vocab] int32, to be lowered
    rows, vocab, stride,
    TILE: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < rows
    tile = tl.program_id(0) // (TILE // BLOCK_COLUMNS)
    factor = tl.exp(log_factor(tile_maximum, maximum, log_sum, tile, row, row, inside, rows))
    above = tl.load(cut + row, mask=inside, other=0)
    # w <= 1: most tiles hold no such column in any of these rows, and their weights need not be read.
    candidate = inside & (factor > above)
    if tl.max(candidate.to(tl.int32), axis=0) > 0:
        read = candidate[None, :] & (column < vocab)[:, None]
        w = tl.load(weights + column.to(tl.int64)[:, None] * stride + row[None, :], mask=read, other=0)
        found = read & (w.to(tl.float32) * factor[None, :] > above[None, :])
        rank = tl.load(ranks + row, mask=inside, other=0).to(tl.int32)
        lowest = tl.min(tl.where(found, rank[None, :], rows), axis=1)
        tl.atomic_min(first + column, lowest, mask=lowest < rows, sem="relaxed")


@triton.jit(do_not_specialize=["rows", "tiles_of_part"])
def dropped_mass_kernel(
    weights,  # [vocab, stride]
    tile_maximum,  # [tiles, rows] float32
    maximum, log_sum,  # [rows] float32
    active,  # [vocab] uint8
    mass,  # [parts, rows] float32
    rows, vocab, stride, tiles_of_part,
    TILE: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < rows
    part = tl.program_id(1)
    first_tile = part * tiles_of_part
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    for tile in range(first_tile, tl.minimum(first_tile + tiles_of_part, tl.cdiv(vocab, TILE))):
        of_tile = tl.zeros([BLOCK_ROWS], tl.float32)
        for offset in range(0, TILE, BLOCK_COLUMNS):
            column = tile * TILE + offset + tl.arange(0, BLOCK_COLUMNS)
            dropped = tl.load(active + column, mask=column < vocab, other=1) == 0
            w = tl.load(
                weights + column.to(tl.int64)[:, None] * stride + row[None, :],
                mask=dropped[:, None] & (row < stride)[None, :],
                other=0,
            )
            of_tile += tl.sum(w.to(tl.float32), axis=0)
        total += of_tile * tl.exp(log_factor(tile_maximum, maximum, log_sum, tile, row, row, inside, rows))
    tl.store(mass + part.to(tl.int64) * rows + row, total, mask=inside)


@triton.jit(do_not_specialize=["rows", "parts"])
def sum_parts_kernel(
    parts_of,  # [parts, rows] float32
    out,  # [rows] float32
    rows, parts, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    at = parts_of + row
    for _ in range(parts):
        total += tl.load(at, mask=row < rows, other=0)
        at += rows
    tl.store(out + row, total, mask=row < rows)


class TritonTiles(Tiles):
    aligned_rows = 128  # of a tile of logits

    def __init__(self, head: HeadInputs, matmul: HeadMatmul, capacity: int):
        self.head, self.matmul = head, matmul
        self.vocab = head.weight.shape[0]
        self.tile = tile_config(head.weight, head.bias, head.softcap).block_vocab
        self._buffer = torch.empty(self.vocab * padded(capacity), dtype=matmul.operand_dtype, device=head.weight.device)

    @staticmethod
    def bytes_needed(head: HeadInputs, matmul: HeadMatmul, sparse: bool) -> tuple[int, int]:
        vocab, size = head.weight.shape[0], matmul.operand_dtype.itemsize
        tiles = -(-vocab // tile_config(head.weight, head.bias, head.softcap).block_vocab)
        per_row = vocab * size + 4 * (4 * tiles + 4 * VOCABULARY_PARTS)
        gathered = head.workspace_bytes // GATHERED_SHARE if sparse else 0
        return per_row, vocab * size * padded(1) + gathered + matmul.buffer_bytes

    def fill(self, h: Tensor, target: Tensor, temperature: PerRow) -> Partial:
        rows = h.shape[0]
        line = padded(rows)
        self.weights = self._buffer[: self.vocab * line].view(self.vocab, line)[:, :rows]
        self.max, self.sum = torch.empty(2, -(-self.vocab // self.tile), rows, device=h.device)
        store = Store(self.weights, self.max, self.sum)
        return statistics(h, self.matmul.weight, self.head.bias, target, temperature, self.head.softcap, store)

    def gradient(self, rows: Tensor | None, gradient: RowGradient) -> tuple[Tensor, Tensor | None]:
        order, count = None, self.weights.shape[1]
        if rows is not None:
            slot_of_row = _close_up(rows, count)
            order, count, gradient = rows[slot_of_row], len(rows), take(gradient, slot_of_row)
        result = self.weights[:, :count]
        self._gradient(None, order, gradient, result)
        return result, order

    def _gradient(self, columns: Tensor | None, rows: Tensor | None, gradient: RowGradient, out: Tensor):
        grid = (triton.cdiv(out.shape[0], BLOCK_COLUMNS), triton.cdiv(out.shape[1], BLOCK_ROWS))
        if 0 in grid:
            return
        with on(out.device):
            gradient_kernel[grid](
                column_of=columns, row_of=rows, out=out, slots=out.shape[1], columns=out.shape[0], out_stride=out.stride(0),
                **self._weights_arguments(), **gradient_arguments(gradient),
            )  # fmt: skip

    def first_ranks(self, cut: Tensor, ranks: Tensor, statistics: RowStatistics) -> Tensor:
        rows = len(cut)
        first = torch.full((self.vocab,), rows, dtype=torch.int32, device=cut.device)
        if rows:
            with on(cut.device):
                first_ranks_kernel[(triton.cdiv(self.vocab, BLOCK_COLUMNS), triton.cdiv(rows, BLOCK_ROWS))](
                    cut=cut, ranks=ranks, first=first, vocab=self.vocab, **self._weights_arguments(statistics)
                )
        return first.long()

    def dropped_mass(self, active: Tensor, statistics: RowStatistics) -> Tensor:
        # Summed over those columns: 1 - the mass of the others would contain the rounding of 16-bit weights.
        rows = self.weights.shape[1]
        of_part = tiles_per_part(self.vocab, self.tile)
        parts = triton.cdiv(triton.cdiv(self.vocab, self.tile), of_part)
        mass = torch.empty(parts, rows, device=active.device)
        result = torch.empty(rows, device=active.device)
        if rows:
            row_blocks = triton.cdiv(rows, BLOCK_ROWS)
            with on(active.device):
                dropped_mass_kernel[(row_blocks, parts)](
                    active=active.view(torch.uint8), mass=mass, vocab=self.vocab, tiles_of_part=of_part,
                    **self._weights_arguments(statistics),
                )  # fmt: skip
                sum_parts_kernel[(row_blocks,)](mass, result, rows, parts, BLOCK_ROWS=BLOCK_ROWS, **EXACT)
        return result

    def _weights_arguments(self, statistics: RowStatistics | None = None) -> dict:
        """Return what all passes take, and maximum and log_sum of the rows where they are given."""
        rows = {} if statistics is None else dict(maximum=statistics.max, log_sum=statistics.log_sum)
        return dict(
            weights=self.weights, tile_maximum=self.max, rows=self.weights.shape[1], stride=self.weights.stride(0),
            TILE=self.tile, BLOCK_COLUMNS=BLOCK_COLUMNS, BLOCK_ROWS=BLOCK_ROWS,
            **{name: field.contiguous() for name, field in rows.items()}, **EXACT,
        )  # fmt: skip

    def compact_gradient(self, columns: Tensor, rows: Tensor, gradient: RowGradient) -> Iterator[tuple[Tensor, Tensor]]:
        # Per column: the row of the weight that is gathered, its float32 gradient, the weights of the chunk, and dz.
        column_bytes = 2 * 4 * (self.head.weight.shape[1] + self.weights.shape[1])
        step = min(PIECE_COLUMNS, self.head.workspace_bytes // GATHERED_SHARE // column_bytes)
        step = max(1, step - step % ALIGNED or step)
        for piece in columns.split(step):
            dz = self._buffer.new_empty(len(piece), padded(len(rows)))[:, : len(rows)]
            self._gradient(piece, rows, gradient, dz)
            yield piece, dz


def _close_up(rows: Tensor, count: int) -> Tensor:
    """Return, for each of len(rows) slots, the index in `rows` (ascending, of `count`) of its row: row i if wanted,
    otherwise a wanted row from behind the slots, so that rows can be compacted in place."""
    wanted = torch.zeros(count, dtype=torch.bool, device=rows.device).index_fill_(0, rows, True)[: len(rows)]
    return torch.where(wanted, wanted.cumsum(0) - 1, len(rows) - (~wanted).cumsum(0))
