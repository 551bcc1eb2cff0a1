"""The three products with the head's weight, accumulated and returned in float32 whatever the operands.

Log-probs from logits rounded to bf16 are the main source of trainer/sampler mismatch, so no product is rounded to the 16-bit
dtype of the weight. How depends on dtype and device:

    operands float32 (or float64)   plain GEMM
    16-bit on CUDA                  tensor cores with `out_dtype=torch.float32`
    16-bit on CPU                   there is no such GEMM: slabs of the weight are upcast into a small reused buffer
"""

import torch
from torch import Tensor

SLAB = 2048  # rows of the weight that are copied at a time, upcast or padded
# GEMMs of 16-bit operands on CUDA get sums over a multiple of 8 terms. In other sums cuBLAS of CUDA 13.0 can lose the last
# term: seen with 10,241 terms, bf16 and fp16, result [128, 2048], on an H200. They are slower, too.
ALIGNED = 8


class HeadMatmul:
    """Products with `weight` [V, D] or, in the methods that take `columns`, with that slice of its rows."""

    def __init__(self, weight: Tensor, compute_dtype: torch.dtype, slab_bytes: int):  # of the buffer, at most
        self.weight = weight.detach()
        self.compute_dtype = compute_dtype
        vocab, width = weight.shape
        upcast_row_bytes = max(width, 1) * compute_dtype.itemsize
        on_cpu = weight.device.type == "cpu"
        self.upcasts = on_cpu and weight.dtype != compute_dtype
        self.mixed = not on_cpu and weight.dtype != compute_dtype
        self.operand_dtype = weight.dtype if self.mixed else compute_dtype
        copies = self.upcasts or self._ragged(width)
        self.slab = max(1, min(vocab, SLAB, slab_bytes // upcast_row_bytes)) if copies else vocab
        self.buffer_bytes = self.slab * upcast_row_bytes if copies else 0
        self._buffer = None

    def logits(self, h: Tensor, out: Tensor, columns: slice | None = None):
        """out[columns, rows] = W[columns] @ h^T; h [rows, D] in `operand_dtype`, out in `compute_dtype`."""
        for here, w in self._slabs(columns):
            if self.mixed:
                if self._ragged(w.shape[1]):
                    w, h = zero_padded(w, 1), zero_padded(h, 1)
                torch.mm(w, h.T, out_dtype=self.compute_dtype, out=out[here])
            else:
                torch.mm(w, h.T, out=out[here])

    def add_hidden_grad(self, dz: Tensor, out: Tensor, columns: slice | Tensor | None = None, beta: int = 1):
        """out = beta * out + dz^T @ W[columns]; dz [columns, rows] in `operand_dtype`, out [rows, D] in `compute_dtype`.

        columns may be a few column numbers: these rows of the weight are copied.
        """
        for here, w in self._slabs(columns):
            whole = len(w) - self._ragged(len(w))
            if whole:
                self._addmm(out, dz[here][:whole].T, w[:whole], beta)
                beta = 1
            if whole < len(w):
                self._addmm(out, zero_padded(dz[here][whole:], 0).T, zero_padded(w[whole:], 0), beta)
                beta = 1

    def add_weight_grad(self, dz: Tensor, h: Tensor, out: Tensor, beta: int = 1):
        """out = beta * out + dz @ h; dz [columns, rows], h [rows, D] in `operand_dtype`, out [columns, D] in
        `compute_dtype`. With beta 0 `out` may be uninitialised.

        If the lines of dz are `padded(rows)` long, their padding is overwritten and dz is not copied. h is not copied if it
        comes from `with_padding`.
        """
        rows = dz.shape[1]
        if self._ragged(rows):
            line = rows + -rows % ALIGNED
            if dz.stride(0) >= line:
                dz = dz.as_strided((len(dz), line), dz.stride())
                dz[:, rows:] = 0
            else:
                dz = zero_padded(dz, 1)
        self._addmm(out, dz, self.with_padding(h), beta)

    def with_padding(self, h: Tensor) -> Tensor:
        """Return h [rows, D] followed by the rows of zeros that a sum over the rows needs."""
        return zero_padded(h, 0) if self._ragged(len(h)) else h

    def narrow(self, dz: Tensor) -> Tensor:
        """Return dz [columns, rows] in `operand_dtype`, with padded lines so that `add_weight_grad` does not copy it."""
        if not self.mixed:
            return dz
        lines = torch.empty(len(dz), padded(dz.shape[1]), dtype=self.operand_dtype, device=dz.device)
        return lines[:, : dz.shape[1]].copy_(dz)

    def _ragged(self, terms: int) -> int:
        """Return how many terms of a sum are beyond the last multiple of ALIGNED, where that matters; else 0."""
        return terms % ALIGNED if self.mixed else 0

    def _addmm(self, out: Tensor, a: Tensor, b: Tensor, beta: int):
        if self.mixed:
            torch.addmm(out, a, b, beta=beta, out_dtype=self.compute_dtype, out=out)
        else:
            out.addmm_(a, b, beta=beta)

    def _slabs(self, columns: slice | Tensor | None):
        """Yield (position within `columns`, rows of the weight in `operand_dtype`) slab by slab."""
        weight = self.weight if columns is None else self.weight[columns]
        for start in range(0, weight.shape[0], self.slab):
            here = slice(start, min(start + self.slab, weight.shape[0]))
            w = weight[here]
            if self.upcasts:
                if self._buffer is None:
                    self._buffer = torch.empty(self.slab, w.shape[1], dtype=self.compute_dtype)
                w = self._buffer[: w.shape[0]].copy_(w)
            yield here, w


def padded(rows: int) -> int:
    """Return the length of a line of a vocabulary-major matrix: vector loads and TMA need multiples of 16 elements."""
    return -(-rows // 16) * 16


def zero_padded(matrix: Tensor, dim: int) -> Tensor:
    """Return a copy of the matrix padded with zeros along `dim` to a multiple of ALIGNED."""
    more = -matrix.shape[dim] % ALIGNED
    return torch.nn.functional.pad(matrix, (0, more) if dim == 1 else (0, 0, 0, more))
