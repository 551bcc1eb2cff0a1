"""Which backend runs: the one named, or for "auto" the first row of the table that fits.

The choice never looks at N: the log-probs of a row may not depend on how many others are scored with it.
"""

import importlib.util
from typing import NamedTuple

import torch

from .backends import Backend

BACKENDS = ("reference", "chunked", "triton")
SIXTEEN_BITS = (torch.bfloat16, torch.float16)
TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None  # once: torch 2.11 cannot trace the look-up


class Rule(NamedTuple):
    """A backend and where "auto" takes it: at least this vocabulary and width, a workspace for at least so many rows."""

    backend: str
    device: str | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    least_vocab: int = 0
    least_width: int = 0
    least_workspace_rows: int = 0


# The thresholds for CUDA are estimates: below them a tile of the Triton kernels is mostly padding.
AUTO = (
    Rule("triton", "cuda", SIXTEEN_BITS, least_vocab=4096, least_width=256, least_workspace_rows=128),
    Rule("chunked"),
)


def resolve(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    width: int,
    vocab: int,
    workspace_bytes: int,
    contiguous: bool = True,
) -> str:
    """The name of the backend that `backend` means for these arguments; raises where it cannot run.

    contiguous: the rows of the weight are.
    """
    if backend == "auto":
        rows = workspace_bytes // (vocab * dtype.itemsize)
        return next(
            rule.backend
            for rule in AUTO
            if rule.device in (None, device.type)
            and (rule.dtypes is None or dtype in rule.dtypes)
            and vocab >= rule.least_vocab
            and width >= rule.least_width
            and rows >= rule.least_workspace_rows
            and (rule.backend != "triton" or (contiguous and triton_runs_on(device)))
        )
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is not available: use 'auto', {', '.join(map(repr, BACKENDS))}")
    if backend == "triton":
        if dtype == torch.float64:
            raise TypeError(
                "backend 'triton' takes float32, bfloat16 or float16: use 'chunked' or 'reference' for float64"
            )
        if not TRITON_IS_INSTALLED:
            raise ValueError("backend 'triton' needs the package triton: pip install triton, or use 'chunked'")
    return backend


def triton_runs_on(device: torch.device) -> bool:
    """On Ampere and later. A device that is not here, as in a plan, is taken for one of these."""
    here = device.type == "cuda" and torch.cuda.is_available()
    return TRITON_IS_INSTALLED and (not here or torch.cuda.get_device_capability(device) >= (8, 0))


def backend_named(name: str) -> Backend:
    """The implementation of a fused backend. Triton is imported when it is first wanted: the CPU does without."""
    if name == "triton":
        from .triton_backend import TRITON

        return TRITON
    from .torch_backend import TORCH

    return TORCH
