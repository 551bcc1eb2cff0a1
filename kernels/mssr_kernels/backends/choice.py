"""Which backend runs: the one named, or for "auto" the one that device, dtype and shape of the head call for.

The choice never depends on N: a row's log-prob must not depend on how many rows are scored with it.
"""

import importlib.util

import torch

from .base import Backend

BACKENDS = ("reference", "chunked", "triton")
TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None  # once: torch 2.11 cannot trace the look-up

# "auto" takes "triton" for 16-bit heads on CUDA from this size on. Estimates: below, a tile of its kernels is mostly padding.
LEAST_VOCAB, LEAST_WIDTH = 4096, 256
LEAST_WORKSPACE_ROWS = 128  # whose logits fit into the workspace


def resolve(
    backend: str, device: torch.device, dtype: torch.dtype, width: int, vocab: int, workspace_bytes: int,
    contiguous: bool = True,
) -> str:  # fmt: skip
    """Return the name of the backend that `backend` stands for. Raises where it cannot run.

    contiguous: whether the rows of the weight are.
    """
    if backend == "auto":
        rows = workspace_bytes // (vocab * dtype.itemsize)
        large_enough = vocab >= LEAST_VOCAB and width >= LEAST_WIDTH and rows >= LEAST_WORKSPACE_ROWS
        half = dtype in (torch.bfloat16, torch.float16)
        here = device.type == "cuda" and (contiguous and triton_runs_on(device))
        return "triton" if here and half and large_enough else "chunked"
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is not available: use 'auto', {', '.join(map(repr, BACKENDS))}")
    if backend == "triton":
        if dtype == torch.float64:
            raise TypeError("'triton' takes float32, bfloat16 or float16: use 'chunked' or 'reference' for float64")
        if not TRITON_IS_INSTALLED:
            raise ValueError("backend 'triton' needs the package triton: pip install triton, or use 'chunked'")
    return backend


def triton_runs_on(device: torch.device) -> bool:
    """Return whether Triton runs on `device`; if installed, True for a device that is only planned for (`explain`)."""
    here = device.type == "cuda" and torch.cuda.is_available()
    return TRITON_IS_INSTALLED and (not here or torch.cuda.get_device_capability(device) >= (8, 0))


def backend_named(name: str) -> Backend:
    """Return the implementation of a fused backend. Triton is imported on first use: the CPU does without."""
    if name == "triton":
        from .triton.backend import TRITON

        return TRITON
    from .torch.backend import TORCH

    return TORCH
