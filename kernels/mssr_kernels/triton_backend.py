"""The "triton" backend: everything that touches logits as Triton kernels, bitwise independent of batch size and chunking."""

from collections.abc import Callable

import torch
from torch import Tensor

from .backends import Backend
from .inputs import HeadInputs
from .matmul import HeadMatmul, padded
from .statistics import Partial, RowGradient
from .triton_forward import statistics
from .triton_slab import slab_gradient
from .triton_tiles import TritonTiles
from .triton_tuning import VOCABULARY_PARTS


def _row_sums(head: HeadInputs, matmul: HeadMatmul, h: Tensor, target: Tensor, temperature: Tensor | float) -> Partial:
    bias = None if head.bias is None else head.bias.detach()
    return statistics(h, matmul.weight, bias, target, temperature, head.softcap)


def _rows_at_once(head: HeadInputs, matmul: HeadMatmul) -> int:
    """The parts of the vocabulary leave four numbers for each row."""
    return max(1, head.workspace_bytes // (2 * 4 * 4 * VOCABULARY_PARTS))


def _slab_gradient(
    head: HeadInputs, matmul: HeadMatmul, h: Tensor, gradient: RowGradient, temperature: Tensor | float, width: int
) -> Callable[[slice], Tensor]:
    rows = h.shape[0]
    buffer = torch.empty(width, padded(rows), dtype=matmul.operand_dtype, device=h.device)[:, :rows]
    bias = None if head.bias is None else head.bias.detach()

    def of_columns(columns: slice) -> Tensor:
        out = buffer[: columns.stop - columns.start]
        slab_gradient(h, matmul.weight, bias, columns, gradient, temperature, head.softcap, out)
        return out

    return of_columns


def _slab_bytes_per_column(head: HeadInputs, matmul: HeadMatmul, rows: int) -> int:
    return padded(rows) * matmul.operand_dtype.itemsize


TRITON = Backend(
    tiles=TritonTiles,
    row_sums=_row_sums,
    slab_gradient=_slab_gradient,
    slab_bytes_per_column=_slab_bytes_per_column,
    rows_at_once=_rows_at_once,
)
