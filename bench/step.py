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
not count) per second, relative to the GPU's data sheet, or else to a large product measured beforehand.
"""

import argparse
import sys
from pathlib import Path

import mssr.environment  # noqa: F401  first, as in mssr.cli  # isort: skip
import torch

from mssr.cli import run_command
from mssr.observe.utilisation import peak_tflops

from . import arguments as options
from . import report as report_of
from . import roofs, room, tables
from .child import result
from .report import EAGER
from .room import Need
from .step_case import SIZES
from .step_heads import HEADS

CASE_LIMIT = 600  # seconds
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}  # relative, of loss and gradient norm
SHAPED_HEADS = ("eager", "mssr")


def main(words: list[str] | None = None) -> int:
    arguments = parse_arguments(words)
    report_of.refuse_other_file(arguments.json)
    report = measure(arguments, words)
    report_of.show(tables.step(report))
    report_of.save(report, arguments.json)
    return int(any("error" in case or not case.get("agrees", True) for case in report["cases"]))


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = options.parser(__doc__)
    parser.add_argument("--size", choices=SIZES, default="tiny", help="default: tiny")
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS), help="default: all")
    parser.add_argument(
        "--tokens", type=options.positive, help="per micro-batch, 256 or more (default: 16,384; tiny: 512; 65k: 2,048)"
    )
    parser.add_argument("--repeats", type=options.positive, default=5, help="timed updates; default: 5")
    options.add_dtype(parser, "float32", "bfloat16")
    options.add_device(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    arguments = parser.parse_args(words)
    arguments.dtype = arguments.dtype or options.default_dtype(arguments.device)
    arguments.tokens = arguments.tokens or SIZES[arguments.size].tokens
    if arguments.device == "cpu" and arguments.size not in ("tiny", "65k"):
        parser.error(f"--size {arguments.size} is for a GPU: on a CPU take tiny or 65k")
    return arguments


def measure(arguments: argparse.Namespace, words: list[str] | None = None, limit: float = CASE_LIMIT) -> dict:
    """Return the report. limit: seconds for each head."""
    settings = {key: getattr(arguments, key) for key in ("size", "tokens", "dtype", "repeats")}
    report = report_of.new("bench.step", words, arguments.device, settings)
    cases = {head: settings | {"head": head, "device": arguments.device} for head in arguments.heads}
    why_not = {head: why for head in cases if (why := HEADS[head].provider.why_not(arguments.device))}
    why_not |= what_does_not_fit([case for head, case in cases.items() if head not in why_not])
    report["roof"] = roof(arguments.device, arguments.dtype)
    for head, case in cases.items():
        why = why_not.get(head)
        found = {"skipped": why} if why else result(head, "bench.step_case", case, limit=limit)
        report["cases"].append({"head": head, "work": HEADS[head].provider.work} | found)
    compare(report)
    return report


def what_does_not_fit(cases: list[dict]) -> dict[str, str]:
    """Say the memory that the cases will take; return by head why a case does not fit. Exits with 2 if none fits."""
    if not cases:
        return {}
    from .estimate_models import step_bytes  # imports for seconds; mistakes in the options show first

    words = "{head}, --size {size}, {tokens:,} tokens"
    needs = {
        case["head"]: Need(words.format(**case), step_bytes(case), lambda _: "lower --tokens, or take a smaller --size")
        for case in cases
    }
    return room.fitting(needs, cases[0]["device"], "head")[1]


def roof(device: str, dtype: str) -> dict:
    """Return what the device can do, and how that is known."""
    if known := peak_tflops(torch.device(device), None):
        return {"tflops": known, "source": "data sheet"}
    found = roofs.matmul_tflops(device, getattr(torch, dtype))
    return {"tflops": found, "source": "a large product, measured beforehand"}


def compare(report: dict) -> None:
    """Add to each case its MFU, its ratios to eager, and whether it computed the same."""
    measured = {case["head"]: case for case in report["cases"] if "seconds" in case}
    for head, case in measured.items():
        case["mfu"] = case["tflops"] / report["roof"]["tflops"]
        if eager := measured.get(EAGER):
            case["time_ratio"] = case["seconds"] / eager["seconds"]
            case["extra_ratio"] = case["extra_gib"] / eager["extra_gib"]
            kinds = ("unshaped", "shaped") if head in SHAPED_HEADS else ("unshaped",)
            case["differs"] = max(
                abs(case["checked"][kind][name] / eager["checked"][kind][name] - 1)
                for kind in kinds
                for name in ("loss", "grad_norm")
            )
            case["agrees"] = case["differs"] <= TOLERANCE[report["settings"]["dtype"]]


if __name__ == "__main__":
    run_command(lambda: sys.exit(main()))
