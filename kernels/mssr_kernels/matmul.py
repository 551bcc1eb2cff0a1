"""The three products with the head's weight, accumulated and returned in float32 whatever the operands.

Log-probs from logits rounded to bf16 are the main source of trainer/sampler mismatch, so no product is ever rounded to
the 16-bit dtype of the weight. How that is done depends on the machine:

    operands float32 (or float64)   plain GEMM
    16-bit on CUDA                  tensor cores with `out_dtype=torch.float32`
    16-bit on CPU                   no such GEMM: slabs of the weight are upcast into a small reused buffer
"""

import torch
from torch import Tensor

UPCAST_SLAB = 2048  # rows of the weight upcast at a time


class HeadMatmul:
    """Products with `weight` [V, D] or, for the methods that take `columns`, with that slice of its rows.

    `slab_bytes` bounds the buffer for upcast slabs; `buffer_bytes` is what it takes.
    """

    def __init__(self, weight: Tensor, compute_dtype: torch.dtype, slab_bytes: int):
        self.weight = weight.detach()
        self.compute_dtype = compute_dtype
        vocab, width = weight.shape
        upcast_row_bytes = max(width, 1) * compute_dtype.itemsize
        on_cpu = weight.device.type == "cpu"
        self.upcasts = on_cpu and weight.dtype != compute_dtype
        self.mixed = not on_cpu and weight.dtype != compute_dtype
        self.operand_dtype = weight.dtype if self.mixed else compute_dtype
        self.slab = vocab
        if self.upcasts:
            self.slab = max(1, min(vocab, UPCAST_SLAB, slab_bytes // upcast_row_bytes))
        self.buffer_bytes = self.slab * upcast_row_bytes if self.upcasts else 0
        self._buffer = None

    def logits(self, h: Tensor, out: Tensor, columns: slice | None = None):
        """out[columns, rows] = W[columns] @ h^T; h [rows, D] in `operand_dtype`, out in `compute_dtype`."""
        for here, w in self._slabs(columns):
            if self.mixed:
                torch.mm(w, h.T, out_dtype=self.compute_dtype, out=out[here])
            else:
                torch.mm(w, h.T, out=out[here])

    def add_hidden_grad(self, dz: Tensor, out: Tensor, columns: slice | Tensor | None = None, beta: int = 1):
        """out = beta * out + dz^T @ W[columns]; dz [columns, rows] in `operand_dtype`, out [rows, D] in `compute_dtype`.

        columns may be column numbers, few of them: these rows of the weight are copied.
        """
        for here, w in self._slabs(columns):
            self._addmm(out, dz[here].T, w, beta)
            beta = 1

    def add_weight_grad(self, dz: Tensor, h: Tensor, out: Tensor, beta: int = 1):
        """out = beta * out + dz @ h; dz [columns, rows], h [rows, D] in `operand_dtype`, out [columns, D] in
        `compute_dtype`. With beta 0 `out` may be uninitialised."""
        self._addmm(out, dz, h, beta)

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
