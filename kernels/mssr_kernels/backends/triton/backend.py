"""The "triton" backend: all passes over logits are Triton kernels, bitwise independent of batch size and chunking."""

from collections.abc import Callable

import torch
from torch import Tensor

from ...core.inputs import HeadInputs
from ...core.statistics import Partial, PerRow, RowGradient
from ..base import Backend
from ..matmul import HeadMatmul, padded
from .forward import statistics
from .slab import slab_gradient
from .tiles import TritonTiles
from .tuning import VOCABULARY_PARTS


class TritonBackend(Backend):
    tiles = TritonTiles

    def row_sums(self, head: HeadInputs, matmul: HeadMatmul, h: Tensor, target: Tensor, temperature: PerRow) -> Partial:
        return statistics(h, matmul.weight, head.bias, target, temperature, head.softcap)

    def rows_at_once(self, head: HeadInputs, matmul: HeadMatmul) -> int:
        # Each part of the vocabulary leaves four numbers per row.
        return max(1, head.workspace_bytes // (2 * 4 * 4 * VOCABULARY_PARTS))

    def slab_gradient(
        self, head: HeadInputs, matmul: HeadMatmul, h: Tensor, gradient: RowGradient, temperature: PerRow, width: int
    ) -> Callable[[slice], Tensor]:  # fmt: skip
        rows = h.shape[0]
        buffer = torch.empty(width, padded(rows), dtype=matmul.operand_dtype, device=h.device)[:, :rows]

        def of_columns(columns: slice) -> Tensor:
            out = buffer[: columns.stop - columns.start]
            slab_gradient(h, matmul.weight, head.bias, columns, gradient, temperature, head.softcap, out)
            return out

        return of_columns

    def slab_bytes_per_column(self, head: HeadInputs, matmul: HeadMatmul, rows: int) -> int:
        return padded(rows) * matmul.operand_dtype.itemsize


TRITON = TritonBackend()
