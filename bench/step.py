"""One update of the trainer, with its own head and with others in its place: memory, time, tokens per second, MFU.

    python -m bench.step [--size tiny|65k|3b|7b|7b-lora] [--heads eager liger mssr] [--repeats 5] [--json FILE]

The step is `PolicyEngine.update` on one full micro-batch of packed rows, every other one with an image: forward and backward
with gradient checkpointing, clipping, AdamW. Qwen2.5-VL with random weights: `3b` is whole, `7b` has 12 of its 28 layers
(which one GPU of 141 GB can train in full), `7b-lora` is whole with adapters, `tiny` and `65k` are for a CPU. Each head runs
in a process of its own, on the same weights and rows:

    eager   all logits of the response tokens in float32, autograd through log-softmax, entropy and policy loss
    liger   LigerFusedLinearGRPOLoss: the clipped loss without entropy (so advantages are not shaped) and without log-probs
    mssr    FusedLMHead: the policy loss with exact entropy

Two updates warm up and are checked: one without shaping, where all three compute the same loss, and one with it, where eager
and mssr do. Loss and gradient norm must agree with eager's.
Time: median (lowest to highest). Memory: the peak of one more update, from the allocator on CUDA, else the resident set,
libraries included; `extra` is the part that was not held before. MFU: model FLOPs of forward and backward (recomputation does
not count) per second, relative to the GPU's data sheet, `--peak-tflops`, or else a large product measured beforehand.
"""

import argparse
import sys
from pathlib import Path

import mssr.environment  # noqa: F401  first, as in mssr.cli  # isort: skip
import torch

from . import report as report_of
from . import tables
from .child import result
from .report import EAGER
from .step_case import LEAST_TOKENS, SIZES, device_tflops
from .step_heads import HEADS

CASE_LIMIT = 600  # seconds
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}  # relative, of loss and gradient norm
SHAPED_HEADS = ("eager", "mssr")


def main(words: list[str] | None = None) -> int:
    arguments = parse_arguments(words)
    report = measure(arguments, words)
    report_of.show(tables.step(report))
    report_of.save(report, arguments.json)
    return int(any("error" in case or not case.get("agrees", True) for case in report["cases"]))


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--tokens", type=int, help="tokens per micro-batch (default: 16,384; tiny: 512; 65k: 2,048)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32, on CUDA bfloat16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--peak-tflops", type=float, help="peak TFLOP/s of the device, for the MFU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    arguments = parser.parse_args(words)
    arguments.dtype = arguments.dtype or ("bfloat16" if arguments.device == "cuda" else "float32")
    arguments.tokens = arguments.tokens or SIZES[arguments.size].tokens
    if arguments.device == "cpu" and not SIZES[arguments.size].small:
        parser.error(f"--size {arguments.size} is for a GPU: on a CPU take tiny or 65k")
    if arguments.tokens < LEAST_TOKENS:
        parser.error(f"--tokens {arguments.tokens}: at least {LEAST_TOKENS}")
    return arguments


def measure(arguments: argparse.Namespace, words: list[str] | None = None, limit: float = CASE_LIMIT) -> dict:
    """Return the report. limit: seconds for each head."""
    roof, source = device_tflops(torch.device(arguments.device), arguments.dtype)
    if arguments.peak_tflops:
        roof, source = arguments.peak_tflops, "--peak-tflops"
    settings = {key: getattr(arguments, key) for key in ("size", "tokens", "dtype", "repeats")}
    report = report_of.new("bench.step", words, arguments.device, settings)
    report["roof"] = {"tflops": roof, "source": source}
    for head in (name for name in HEADS if name in arguments.heads):
        case = one_case(head, roof, arguments)
        why = HEADS[head].provider.why_not(arguments.device, None)
        found = {"skipped": why} if why else result("bench.step_case", case, limit=limit)
        if "error" in found:
            print(f"{head}: {found['error']}\n{found['output']}", file=sys.stderr)
        report["cases"].append({"head": head, "work": HEADS[head].provider.work} | found)
    compare(report["cases"], arguments.dtype)
    return report


def one_case(head: str, roof: float, arguments: argparse.Namespace) -> dict:
    common = {key: getattr(arguments, key) for key in ("size", "tokens", "device", "dtype", "repeats")}
    return {"head": head, "roof_tflops": roof} | common


def compare(cases: list[dict], dtype: str) -> None:
    """Add to each case its ratios to eager, and whether it computed the same."""
    eager = next((case for case in cases if case["head"] == EAGER and "seconds" in case), None)
    if eager is None:
        return
    for case in (case for case in cases if "seconds" in case):
        case["time_ratio"] = case["seconds"] / eager["seconds"]
        case["extra_ratio"] = case["extra_gib"] / eager["extra_gib"]
        kinds = ("unshaped", "shaped") if case["head"] in SHAPED_HEADS else ("unshaped",)
        case["differs"] = max(
            abs(case["checked"][kind][name] / eager["checked"][kind][name] - 1)
            for kind in kinds
            for name in ("loss", "grad_norm")
        )
        case["agrees"] = case["differs"] <= TOLERANCE[dtype]


if __name__ == "__main__":
    sys.exit(main())
