"""The softmax weights of a chunk of tokens in plain PyTorch, for modes `exact` and `sparse`. CPU and CUDA, no compiler.

Everything is vocabulary-major, [V, C]: on CPUs W h^T is 25 % faster than h W^T with its huge row stride, sums over the
vocabulary need no horizontal additions, and the columns that mode `sparse` gathers are contiguous.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ...core.inputs import HeadInputs
from ...core.statistics import Partial, PerRow, RowGradient, RowStatistics, merge
from ..base import Tiles
from ..matmul import HeadMatmul, padded
from .softmax import TILE, block_columns, finish_logits_, row_stride, to_gradient_, to_weights_

# 1 / this of the workspace is for the rows of the weight that mode `sparse` gathers, with their gradients.
GATHERED_SHARE = 8


class TorchTiles(Tiles):
    aligned_rows = 16  # a cache line: see `row_stride`

    def __init__(self, head: HeadInputs, matmul: HeadMatmul, capacity: int):
        self.head, self.matmul = head, matmul
        self.vocab, dtype, device = head.weight.shape[0], head.compute_dtype, head.hidden.device
        self.options = dict(dtype=dtype, device=device)
        self.bias = None if head.bias is None else head.bias.to(dtype)
        self.columns = block_columns(capacity, dtype, device, head.workspace_bytes // 8)
        self._buffer = torch.empty(self.vocab * row_stride(capacity, dtype), **self.options)
        self._scratch = torch.empty(self.columns * capacity, **self.options)

    @staticmethod
    def bytes_needed(head: HeadInputs, matmul: HeadMatmul, sparse: bool) -> tuple[int, int]:
        vocab, size = head.weight.shape[0], head.compute_dtype.itemsize
        operands = matmul.operand_dtype.itemsize if matmul.mixed else 0
        per_row = vocab * (size + operands) + 6 * size * -(-vocab // TILE) + 2 * size * TILE
        gathered = head.workspace_bytes // GATHERED_SHARE if sparse else 0
        return per_row, head.workspace_bytes // 8 + gathered + matmul.buffer_bytes + vocab * operands * padded(1)

    def fill(self, h: Tensor, target: Tensor, temperature: PerRow) -> Partial:
        rows = h.shape[0]
        self._stride = row_stride(rows, self._buffer.dtype)
        self.weights = self._buffer[: self.vocab * self._stride].view(self.vocab, -1)[:, :rows]
        self.matmul.logits(h, out=self.weights)
        self.max, self.sum = torch.empty(2, -(-self.vocab // TILE), rows, **self.options)
        parts = []
        for first, tiles, block in self._blocks():
            bias = None if self.bias is None else self.bias[first : first + len(block)]
            finish_logits_(block, bias, temperature, self.head.softcap)
            part, self.max[tiles], self.sum[tiles] = to_weights_(block, target - first, bias is not None, self._scratch)
            parts.append(part)
        return merge(Partial(*map(torch.stack, zip(*parts))))

    def gradient(self, rows: Tensor | None, gradient: RowGradient) -> tuple[Tensor, Tensor | None]:
        count = self.weights.shape[1] if rows is None else len(rows)
        result = self.weights if rows is None else self._buffer[: self.vocab * count].view(self.vocab, count)
        # Compaction in place: blocks move towards the beginning in order, so never past one that is still to be read.
        for first, tiles, block in self._blocks():
            maximum = self.max[tiles]
            if rows is not None:
                moved = self._scratch[: len(block) * count].view(-1, count)
                torch.index_select(block, 1, rows, out=moved)
                block = result[first : first + len(block)].copy_(moved)
                maximum = maximum.index_select(1, rows)
            to_gradient_(block, maximum, gradient.target - first, gradient, self._scratch)
        return self.matmul.narrow(result), rows

    def _blocks(self) -> Iterator[tuple[int, slice, Tensor]]:
        """Yield (first column, its tiles, [columns, C]) block by block."""
        for first in range(0, self.vocab, self.columns):
            block = self.weights[first : first + self.columns]
            yield first, slice(first // TILE, -(-(first + len(block)) // TILE)), block

    def first_ranks(self, cut: Tensor, ranks: Tensor, statistics: RowStatistics) -> Tensor:
        rows, within = len(cut), torch.arange(TILE, device=cut.device)
        first = torch.full((self.vocab,), rows, dtype=torch.int64, device=cut.device)
        log_factor = (self.max - statistics.max).sub_(statistics.log_sum)  # log p = log w + log_factor
        pairs = (log_factor > cut.log()).nonzero()  # no other tile holds such a column
        for piece in pairs.split(max(1, self._scratch.numel() // (4 * TILE))):
            tile, row = piece[:, :1], piece[:, 1:]
            column = (tile * TILE + within).clamp_(max=self.vocab - 1)  # the last tile may repeat the last column
            above = self._buffer.take(column * self._stride + row) > cut[row] * torch.exp(-log_factor[tile, row])
            first.scatter_reduce_(0, column[above], ranks[row].expand_as(column)[above], "amin")
        return first

    def dropped_mass(self, active: Tensor, statistics: RowStatistics) -> Tensor:
        mass = self.tile_mass(statistics).sum(dim=0)
        for piece in active.nonzero()[:, 0].split(self.columns):
            factor = (self.max[piece // TILE] - statistics.max).sub_(statistics.log_sum).exp_()
            mass -= factor.mul_(self.weights[piece]).sum(dim=0)
        return mass.clamp_(min=0)

    def compact_gradient(self, columns: Tensor, rows: Tensor, gradient: RowGradient) -> Iterator[tuple[Tensor, Tensor]]:
        label = torch.searchsorted(columns, gradient.target).clamp_(max=len(columns) - 1)
        label = torch.where(columns[label] == gradient.target, label, -1)
        # A column of the gathered weight, of its gradient, of the weights of the chunk, and of dz.
        column_bytes = 2 * (self.head.weight.shape[1] + self.weights.shape[1]) * self.max.element_size()
        step = max(1, min(self.columns, self.head.workspace_bytes // GATHERED_SHARE // column_bytes))
        for first in range(0, len(columns), step):
            piece = columns[first : first + step]
            dz = self.weights[piece].index_select(1, rows)
            maximum = self.max[piece // TILE].index_select(1, rows)
            to_gradient_(dz, maximum, label - first, gradient, self._scratch, tile=1)
            yield piece, self.matmul.narrow(dz)
