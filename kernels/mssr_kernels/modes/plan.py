"""`explain`: what a call would do and cost, without doing it."""

from dataclasses import dataclass

import torch

from ..backends.base import Backend, fitting, rows_per_chunk
from ..backends.choice import backend_named, resolve
from ..core.inputs import WORKSPACE_BYTES, HeadInputs

MIB = 1 << 20


@dataclass(frozen=True)
class Plan:
    """Cost of one call in which every row has a gradient. Bytes are estimates; FLOPs are those of the matrix products."""

    backend: str
    mode: str  # "reference", "forward", "recompute", "exact" or "sparse"
    chunk_rows: int  # tokens whose logits are in memory at once; 0 where there are no chunks of tokens
    chunks: int
    flops: int
    moved_bytes: int  # between device memory and chip: weight, logits, hidden and gradients, each time they are moved
    workspace_bytes: int  # beside inputs, results and gradients
    gradient_bytes: int  # the gradients as they are accumulated
    eager_logits_bytes: int  # what the logits of all rows would take in float32

    def __str__(self) -> str:
        chunks = {"forward": "no logits kept", "recompute": "a slab of columns of the logits at a time"}.get(
            self.mode, f"{self.chunks} x {self.chunk_rows} rows of logits"
        )
        return (
            f"backend {self.backend}, mode {self.mode}: {chunks}; {self.flops / 1e12:.2f} TFLOP, "
            f"{self.moved_bytes / 2**30:.2f} GiB moved, workspace {self.workspace_bytes / MIB:.0f} MiB, "
            f"gradients {self.gradient_bytes / MIB:.0f} MiB (eager logits alone: {self.eager_logits_bytes / MIB:.0f} MiB)"
        )


def explain(
    n: int, d: int, v: int, *, dtype: torch.dtype = torch.bfloat16, device: str | torch.device = "cuda", loss: bool = True,
    hidden_grad: bool = True, weight_grad: bool = True, backend: str = "auto", workspace_bytes: int = WORKSPACE_BYTES,
    vocab_drop_tol: float | None = None,
) -> Plan:  # fmt: skip
    """Return the plan of `linear_policy_loss` (loss=True) or `linear_logprob_entropy` for hidden [n, d] and weight [v, d].

    Nothing is allocated, and the device need not be there. In mode `sparse`, FLOPs and bytes are those of chunks in which
    every row is dense, because the gain depends on the rows.
    """
    device = torch.device(device)
    name = resolve(backend, device, dtype, d, v, workspace_bytes)
    product, gradient, size = 2 * n * d * v, hidden_grad or weight_grad, dtype.itemsize
    products = 1 + hidden_grad + weight_grad
    logits, weight, hidden = 4 * n * v, size * d * v, size * n * d
    gradient_bytes = 4 * n * d * hidden_grad + 4 * d * v * weight_grad
    if name == "reference":
        # Logits, log-probs, probabilities and their gradient, float32 copies of both operands.
        moved, workspace = 10 * logits + 3 * weight, 4 * logits + 4 * d * (n + v)
        return Plan(name, "reference", n, 1, products * product, moved, workspace, gradient_bytes, logits)
    implementation: Backend = backend_named(name)
    if not gradient or not loss:
        mode = "recompute" if gradient else "forward"
        recomputed = gradient * (1 + hidden_grad + weight_grad)
        # A slab of dW is rounded as soon as it is complete; dhidden is accumulated in float32 and then rounded.
        gradient_bytes = n * d * (4 + size) * hidden_grad + size * d * v * weight_grad
        moved = weight * (1 + recomputed) + hidden * 2 + (2 * size * n * v * gradient) + gradient_bytes
        return Plan(name, mode, 0, 0, (1 + recomputed) * product, moved, workspace_bytes, gradient_bytes, logits)
    # Shapes and dtypes without memory; any device but the CPU counts as CUDA.
    number = torch.empty(1, dtype=dtype, device="cpu" if device.type == "cpu" else "meta")
    of_shape = number.expand if device.type == "cpu" else number.new_empty
    head = HeadInputs(of_shape(n, d), of_shape(v, d), None, number.long().expand(n), workspace_bytes=workspace_bytes)
    row_bytes, other_bytes = implementation.tiles.bytes_needed(head, implementation.matmul(head), bool(vocab_drop_tol))
    most = fitting(head, row_bytes, other_bytes, "one row of logits")
    rows = rows_per_chunk(n, most, implementation.tiles.aligned_rows)
    chunks = -(-n // max(rows, 1))
    # Per chunk: the logits are written, turned into the gradient in place and read by each of its products; the weight is
    # read by both products with it; dW is read and written.
    moved = n * row_bytes * (4 + weight_grad) + chunks * (weight * (1 + hidden_grad) + 8 * d * v * weight_grad)
    mode = "sparse" if vocab_drop_tol else "exact"
    return Plan(name, mode, rows, chunks, products * product, moved, workspace_bytes, gradient_bytes, logits)
