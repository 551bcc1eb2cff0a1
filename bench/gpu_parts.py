"""What `bench.gpu` measures, each in a process of its own, which prints what it found as one line of JSON.

python -m bench.gpu_parts roofs | sync | step SIZE HEAD | measure WORDS OF bench.kernels
"""

import argparse
import json
import statistics
import sys

import torch

REPEATS = 20
GIB = 1 << 30


def main(kind: str, *words: str):
    found = {"roofs": roofs, "sync": sync, "step": step, "measure": measure}[kind](*words)
    print(json.dumps(found), flush=True)


def roofs() -> dict:
    """A large bf16 product, one of the shape of the 7B head, and a copy within the device."""

    def tflops(m: int, k: int, n: int, repeats: int) -> float:
        a, b = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in ((m, k), (k, n)))
        out = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
        return 2 * m * k * n / median_seconds(lambda: torch.mm(a, b, out=out), repeats) / 1e12

    found = {
        "matmul_tflops": tflops(8192, 8192, 8192, 100),
        "head_matmul_tflops": tflops(8192, 3584, 152064, 20),
    }
    source = torch.empty(4 * GIB, dtype=torch.uint8, device="cuda").zero_()
    copy = torch.empty_like(source)
    found["copy_tb_per_s"] = 2 * source.numel() / median_seconds(lambda: copy.copy_(source), 20) / 1e12
    return found


def median_seconds(call, repeats: int) -> float:
    """By the device's own clock."""
    for _ in range(3):
        call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


def measure(*words: str) -> dict:
    """`bench.kernels` and, beside it, the forward pass alone and the products of mode S."""
    from . import kernels

    arguments = kernels.parse_arguments([*words, "--device", "cuda", "--dtype", "bfloat16", "--repeats", str(REPEATS)])
    report = kernels.measure(arguments)
    report["model"] = arguments.model
    report["forward"] = attempt(lambda: forward_seconds(kernels.make(arguments)))
    report["sparse"] = attempt(lambda: sparse_products(kernels.make(arguments), arguments))
    return report


def attempt(function) -> dict:
    """The rest of the report is worth more than this figure."""
    try:
        return function()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"}


def sync() -> dict:
    """`bench.sync` at the dimensions of Qwen2.5-VL-7B."""
    from . import sync as benchmark

    (case,) = benchmark.measure(benchmark.parse_arguments(["--model", "7b", "--device", "cuda"]))["cases"]
    if "error" in case:
        raise RuntimeError(f"{case['error']}\n{case['output']}")
    return case


def step(size: str, head: str) -> dict:
    """A case of `bench.step`."""
    from . import step as benchmark

    arguments = benchmark.parse_arguments(["--size", size, "--repeats", "3", "--device", "cuda"])
    return benchmark.measure_here(head, arguments)


def forward_seconds(tensors) -> dict:
    from mssr_kernels import linear_logprob_entropy

    found = {}
    with torch.no_grad():
        for backend in ("triton", "chunked"):
            call = lambda backend=backend: linear_logprob_entropy(*tensors[:3], backend=backend)  # noqa: E731
            found[backend] = median_seconds(call, REPEATS)
    return found


def sparse_products(tensors, arguments: argparse.Namespace) -> dict:
    """The products of mode S in units of NDV: f is the backward's share of mode L's 4, and dense rows which were put off
    go through the forward twice."""
    from mssr_kernels import choice, explain
    from mssr_kernels.matmul import HeadMatmul

    from . import kernels

    n, d, v = arguments.n, arguments.d, arguments.v
    name = explain(n, d, v, dtype=tensors.hidden.dtype, device=tensors.hidden.device).backend
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
        kernels.run(tensors, "mssr S", arguments)
    finally:
        HeadMatmul._addmm, tiles.fill = addmm, fill
    f = backward / (4 * n * d * v)
    return {"f": f, "forward_rows": forward_rows, "units": 2 * forward_rows / n + 4 * f}


if __name__ == "__main__":
    main(*sys.argv[1:])
