"""Measured limits of the machine: a large product per dtype, and a copy; and the share of them that a job reaches."""

import time

import torch

REPEATS = {"cpu": 7, "cuda": 50}
SIZE = {"cpu": 1536, "cuda": 8192}  # rows and columns of the product: larger than caches, and edges do not matter
COPY_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}


def measure(device: str, dtypes: list[str]) -> dict:
    """Return matmul_tflops by dtype and copy_gb_per_s (bytes read plus bytes written); medians."""
    return {
        "matmul_tflops": {dtype: matmul_tflops(device, getattr(torch, dtype)) for dtype in dtypes},
        "copy_gb_per_s": copy_gb_per_s(device),
    }


def matmul_tflops(device: str, dtype: torch.dtype) -> float:
    size = SIZE[device]
    a, b, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
    return 2 * size**3 / median_seconds(lambda: torch.mm(a, b, out=out), device) / 1e12


def copy_gb_per_s(device: str) -> float:
    source = torch.ones(COPY_BYTES[device], dtype=torch.uint8, device=device)
    copy = torch.empty_like(source)
    return 2 * source.numel() / median_seconds(lambda: copy.copy_(source), device) / 1e9


def median_seconds(call, device: str) -> float:
    for _ in range(3):
        call()
    seconds = sorted(seconds_of(call, device) for _ in range(REPEATS[device]))
    return seconds[len(seconds) // 2]


def seconds_of(call, device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str):
    if device == "cuda":
        torch.cuda.synchronize()


def share(flops: float, bytes_: float, seconds: float, dtype: str, roofs: dict) -> float:
    """Return roof time / measured time; roof time is the larger of compute and memory time."""
    of_products = flops / (roofs["matmul_tflops"][dtype] * 1e12)
    of_memory = bytes_ / (roofs["copy_gb_per_s"] * 1e9)
    return max(of_products, of_memory) / seconds
