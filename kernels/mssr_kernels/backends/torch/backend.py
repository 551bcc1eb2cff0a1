"""The "chunked" backend: plain PyTorch, CPU and CUDA, float32, 16 bits and float64."""

from collections.abc import Callable

import torch
from torch import Tensor

from ...core.inputs import HeadInputs
from ...core.statistics import FLOOR, Partial, PerRow, RowGradient, merge
from ..base import Backend, fitting
from ..matmul import HeadMatmul, padded
from .softmax import block_columns, finish_logits_, row_stride, to_gradient_, to_weights_
from .tiles import TorchTiles

# Statistics alone need no chunk of logits, only a slab of its columns at a time.
SLAB_COLUMNS = 1024
SLAB_ROWS = {"cpu": 2048, "cuda": 16384}


class TorchBackend(Backend):
    tiles = TorchTiles

    def row_sums(self, head: HeadInputs, matmul: HeadMatmul, h: Tensor, target: Tensor, temperature: PerRow) -> Partial:
        options = dict(dtype=head.compute_dtype, device=h.device)
        rows, most = h.shape[0], min(SLAB_COLUMNS, head.weight.shape[0])
        slab = torch.empty(most, row_stride(rows, head.compute_dtype), **options)[:, :rows]
        scratch = torch.empty(most * rows, **options)
        parts = []
        for first in range(0, head.weight.shape[0], SLAB_COLUMNS):
            columns = slice(first, min(first + SLAB_COLUMNS, head.weight.shape[0]))
            z = slab[: columns.stop - first]
            matmul.logits(h, out=z, columns=columns)
            finish_logits_(z, _bias(head, columns), temperature, head.softcap)
            parts.append(to_weights_(z, target - first, masked=head.bias is not None, scratch=scratch)[0])
        return merge(Partial(*map(torch.stack, zip(*parts))))

    def rows_at_once(self, head: HeadInputs, matmul: HeadMatmul) -> int:
        most = SLAB_ROWS.get(head.hidden.device.type, SLAB_ROWS["cuda"])
        row_bytes = 2 * min(SLAB_COLUMNS, head.weight.shape[0]) * head.compute_dtype.itemsize
        return min(most, fitting(head, row_bytes, matmul.buffer_bytes, "one row of logits"))

    def slab_gradient(
        self, head: HeadInputs, matmul: HeadMatmul, h: Tensor, gradient: RowGradient, temperature: PerRow, width: int
    ) -> Callable[[slice], Tensor]:  # fmt: skip
        rows = h.shape[0]
        options = dict(dtype=head.compute_dtype, device=h.device)
        buffer = torch.empty(width, row_stride(rows, head.compute_dtype), **options)[:, :rows]
        step = min(width, block_columns(rows, head.compute_dtype, h.device, head.workspace_bytes // 8))
        scratch = torch.empty(step * rows, **options)

        def of_columns(columns: slice) -> Tensor:
            z = buffer[: columns.stop - columns.start]
            matmul.logits(h, out=z, columns=columns)
            for first in range(0, len(z), step):
                block, start = z[first : first + step], columns.start + first
                finish_logits_(block, _bias(head, slice(start, start + len(block))), temperature, head.softcap)
                block.sub_(gradient.max)
                if head.bias is not None:
                    block.clamp_(min=FLOOR)
                label = gradient.target - start
                to_gradient_(block.exp_(), gradient.max[None], label, gradient, scratch, tile=len(block))
            return matmul.narrow(z)

        return of_columns

    def slab_bytes_per_column(self, head: HeadInputs, matmul: HeadMatmul, rows: int) -> int:
        size = head.compute_dtype.itemsize
        return rows * 2 * size + (padded(rows) * matmul.operand_dtype.itemsize if matmul.mixed else 0)


def _bias(head: HeadInputs, columns: slice) -> Tensor | None:
    return None if head.bias is None else head.bias[columns].to(head.compute_dtype)


TORCH = TorchBackend()
