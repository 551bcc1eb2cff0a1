"""FLOPs and bytes of a provider's job: declared, or counted if they depend on the rows."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from .jobs import Provider
from .shapes import Shape

PRODUCTS = {
    "aten::mm": slice(0, 2),
    "aten::addmm": slice(1, 3),
    "aten::addmm_": slice(1, 3),
}  # positions of the operands


def flops(provider: Provider, task: str, shape: Shape) -> float:
    return 2.0 * shape.n * shape.d * shape.v * getattr(provider.products, task)


def bytes_moved(provider: Provider, task: str, shape: Shape) -> float:
    """Return a lower bound: each product reads or writes [N, D] and [V, D] once; the rest are passes over [N, V]."""
    n, d, v = shape.n, shape.d, shape.v
    operands = getattr(provider.products, task) * (n * d + d * v)
    return float(getattr(torch, shape.dtype).itemsize * (operands + getattr(provider.passes, task) * n * v))


def executed_flops(job: Callable[[], object]) -> int:
    """Return the FLOPs of PyTorch's matrix products in one run, from the shapes in its profile."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        job()
    shapes = [event.input_shapes[PRODUCTS[event.name]] for event in seen.events() if event.name in PRODUCTS]
    return sum(2 * a[0] * a[1] * b[1] for a, b in shapes)
