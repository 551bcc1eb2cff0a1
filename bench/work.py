"""The FLOPs and bytes of a job, as the provider does it: declared, and counted where they depend on the rows."""

from collections.abc import Callable

import torch

from .jobs import Provider
from .shapes import Shape


def flops(provider: Provider, task: str, shape: Shape) -> float:
    return 2.0 * shape.n * shape.d * shape.v * getattr(provider.products, task)


def bytes_moved(provider: Provider, task: str, shape: Shape) -> float:
    """At least: each product reads or writes each of [N, D] and [V, D] once, the rest are passes over [N, V]."""
    n, d, v = shape.n, shape.d, shape.v
    operands = getattr(provider.products, task) * (n * d + d * v)
    return float(getattr(torch, shape.dtype).itemsize * (operands + getattr(provider.passes, task) * n * v))


def of_sparse(job: Callable[[], None], task: str, shape: Shape, device: str, workspace_bytes: int) -> dict:
    """Mode sparse: {"flops", "f": share of the backward products of mode exact, "forward_rows": deferred rows count twice}.
    Counted from within during one run of `job`."""
    from mssr_kernels import explain
    from mssr_kernels.backends import choice
    from mssr_kernels.backends.matmul import HeadMatmul

    n, d, v = shape.n, shape.d, shape.v
    dtype = getattr(torch, shape.dtype)
    name = explain(n, d, v, dtype=dtype, device=device, workspace_bytes=workspace_bytes, vocab_drop_tol=0.5).backend
    tiles = choice.backend_named(name).tiles
    addmm, fill = HeadMatmul._addmm, tiles.fill
    backward = forward_rows = 0

    def counting_addmm(self, out, a, b, beta):
        nonlocal backward
        backward += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return addmm(self, out, a, b, beta)

    def counting_fill(self, h, *rest):
        nonlocal forward_rows
        forward_rows += len(h)
        return fill(self, h, *rest)

    HeadMatmul._addmm, tiles.fill = counting_addmm, counting_fill
    try:
        job()
    finally:
        HeadMatmul._addmm, tiles.fill = addmm, fill
    dense = 2.0 * n * d * v * (2 if task == "loss" else 1)
    return {"flops": 2.0 * forward_rows * d * v + backward, "f": backward / dense, "forward_rows": forward_rows}
