"""One update of the trainer, with its own head and with others in its place: memory, time, tokens a second, MFU.

    python -m bench.step [--size tiny|65k|3b|7b|7b-lora] [--heads eager liger mssr] [--repeats 5] [--json FILE]
    python -m bench.step --size 65k --longest --limit-gib 6

The step is `PolicyEngine.update` on one full micro-batch of packed rows, every other one with an image: both passes with
gradient checkpointing, clipping, AdamW. Qwen2.5-VL of random weights: `3b` whole, `7b` with 12 of its 28 layers, which one
GPU of 141 GB holds with all its weights trained, `7b-lora` whole with adapters, `tiny` and `65k` for a CPU. Each head is in
a process of its own, on the same weights and rows:

    eager   all logits of the response tokens in float32, autograd through log-softmax, entropy and policy loss
    liger   LigerFusedLinearGRPOLoss: the clipped loss without entropy, so advantages are not shaped, and no log-probs
    mssr    FusedLMHead: the policy loss with exact entropy

Two updates warm up, and are checked: without shaping, where all three compute one loss, and with it, where eager and mssr do.
Loss and gradient norm must agree with eager's.
Time: median (min..max). Memory: the peak of the updates that are timed, from the allocator on CUDA, else the resident set,
libraries included; `extra` is what of it was not held before. MFU: model FLOPs of both passes (what is recomputed does not
count) by their time, of the GPU's data sheet, `--peak-tflops`, or else a large product measured beforehand.
`--longest`: the longest micro-batch that fits into the device, or on a CPU into `--limit-gib`, in tokens, to a sixteenth;
found by doubling, then halving the interval, each try in a process of its own.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mssr.environment  # noqa: F401  first, as in mssr.cli  # isort: skip
import torch
from rich.console import Console
from rich.table import Table

from mssr.config import validate_config
from mssr.distributed import start_world
from mssr.planning.memory import Machine, MemoryPlanner
from mssr.planning.trace import MicroBatchShape

from . import machine, step_case
from .step_case import LEAST_TOKENS, SIZES, device_tflops, make_batch, model_options, sequence_lengths, zero_stage
from .step_heads import HEADS
from .sync import available_bytes
from .sync_case import GIB

ROOT = Path(__file__).resolve().parents[1]
CASE_LIMIT = 600  # seconds
LIBRARIES = 0.8 * GIB  # resident before a model is there, as measured
MOST_TOKENS = 1 << 20  # of --longest
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}  # relative, of loss and gradient norm
SHAPED_HEADS = ("eager", "mssr")
OUT_OF_MEMORY = ("out of memory", "allocate memory", "MemoryError", "bad_alloc")


def main():
    arguments = parse_arguments()
    report = {"command": " ".join(["python -m bench.step", *sys.argv[1:]]), "date": datetime.date.today().isoformat()}
    report |= measure(arguments)
    print_report(report)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=2) + "\n")
    sys.exit(int(any("error" in case or not case.get("agrees", True) for case in report["cases"])))


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--tokens", type=int, help="of the micro-batch; default: 16,384, of tiny 512, of 65k 2,048")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32, on CUDA bfloat16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--peak-tflops", type=float, help="of the device, for the MFU")
    parser.add_argument("--longest", action="store_true", help="also find the longest micro-batch that fits")
    parser.add_argument("--limit-gib", type=float, help="of --longest on a CPU: what the process may take")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    arguments = parser.parse_args(words)
    arguments.dtype = arguments.dtype or ("bfloat16" if arguments.device == "cuda" else "float32")
    arguments.tokens = arguments.tokens or SIZES[arguments.size].tokens
    if arguments.tokens < LEAST_TOKENS:
        parser.error(f"--tokens {arguments.tokens}: at least {LEAST_TOKENS}")
    if arguments.longest and arguments.device == "cpu" and not arguments.limit_gib:
        parser.error("--longest on a CPU needs --limit-gib: without it the machine's other work would end")
    return arguments


def measure(arguments: argparse.Namespace) -> dict:
    roof, source = device_tflops(torch.device(arguments.device), arguments.dtype)
    if arguments.peak_tflops:
        roof, source = arguments.peak_tflops, "--peak-tflops"
    predicted = predicted_bytes(arguments)
    cases = []
    for head in (name for name in HEADS if name in arguments.heads):
        case = one_case(head, roof, arguments)
        why = why_not(head, predicted, arguments)
        found = {"skipped": why} if why else run(case)
        if arguments.longest and not why:
            limited = case | {"repeats": 1, "limit_gib": arguments.limit_gib}
            found["longest"] = longest(
                lambda tokens, limited=limited: run(limited | {"tokens": tokens}), arguments.tokens
            )
        cases.append({"head": head, "work": HEADS[head].work} | found)
    compare(cases, arguments.dtype)
    settings = {key: getattr(arguments, key) for key in ("size", "tokens", "dtype", "repeats", "limit_gib")}
    return {
        "settings": settings,
        "machine": machine.facts(arguments.device),
        "roof": {"tflops": roof, "source": source},
        "predicted_gib": predicted / GIB,  # by `mssr plan`, with the trainer's own head; on a CPU without libraries
        "cases": cases,
    }


def measure_here(head: str, arguments: argparse.Namespace) -> dict:
    """One head, in this process."""
    roof, _ = device_tflops(torch.device(arguments.device), arguments.dtype)
    found = step_case.measure(start_world(arguments.device), one_case(head, roof, arguments))
    return {"head": head, "work": HEADS[head].work} | found


def one_case(head: str, roof: float, arguments: argparse.Namespace) -> dict:
    common = {key: getattr(arguments, key) for key in ("size", "tokens", "device", "dtype", "repeats")}
    return {"head": head, "roof_tflops": roof, "limit_gib": None} | common


def predicted_bytes(arguments: argparse.Namespace) -> int:
    """Peak of the update, as `mssr plan` has it."""
    size = SIZES[arguments.size]
    config, batch = size.config(), make_batch(size.config(), arguments.tokens)
    grids = tuple(tuple(p.image_grid_thw[0].tolist()) for p in batch.prompts if p.image_grid_thw is not None)
    shape = MicroBatchShape(tuple(sequence_lengths(arguments.tokens)), int(batch.lengths.sum()), grids)
    model = model_options(size, arguments.dtype).model_dump()
    settings = validate_config({
        "run_dir": "unused", "model": model, "data": {"train": "unused"}, "rollout": {"engine": "hf"},
        "algorithm": {"kl_coef": 0.0}, "train": {"zero_stage": zero_stage(arguments.dtype)},
    })  # fmt: skip
    memory = MemoryPlanner(config, Machine(arguments.device, 1)).predict(settings, shape, micro_batches=1)
    return max(memory.total("forward_backward"), memory.total("optimizer"))


def why_not(head: str, predicted: int, arguments: argparse.Namespace) -> str | None:
    """Why this case is not run here. A machine out of memory would end other work than ours; a GPU says no."""
    if arguments.device == "cuda":
        return None
    logits = 4 * arguments.tokens * 2 // 3 * SIZES[arguments.size].config().get_text_config().vocab_size
    needed, available = LIBRARIES + predicted + (4 * logits if head == "eager" else 0), available_bytes()
    if needed > 0.9 * available:
        return f"needs about {needed / GIB:.0f} GiB of memory, {available / GIB:.0f} are available"
    return None


def run(case: dict) -> dict:
    """What the case prints, or its error."""
    command = [sys.executable, "-m", "bench.step_case", json.dumps(case)]
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=os.environ)
    try:
        ended = subprocess.run(command, timeout=CASE_LIMIT, **options)
    except subprocess.TimeoutExpired as error:
        return {"error": f"over its {CASE_LIMIT} s", "output": str(error.stdout or "")[-3000:]}
    result = [line for line in ended.stdout.splitlines() if line.startswith('{"')]
    if ended.returncode == 0 and result:
        return json.loads(result[-1])
    lines = [line for line in ended.stdout.splitlines() if "Error: " in line]
    return {
        "error": lines[-1].strip()[:300] if lines else f"exit code {ended.returncode}",
        "output": ended.stdout[-3000:],
    }


def longest(attempt: Callable[[int], dict], start: int) -> dict:
    """The most tokens that fit; attempt: `run` of so many."""
    tried = {}

    def fits(tokens: int) -> bool:
        found = attempt(tokens)
        tried[tokens] = found.get("error", "fits")
        print(f"{tokens} tokens: {tried[tokens]}", file=sys.stderr)
        if "error" in found and not any(words in found["output"] for words in OUT_OF_MEMORY):
            raise RuntimeError(f"{tokens} tokens: {found['error']}")
        return "error" not in found

    low, high = 0, start
    try:
        while high <= MOST_TOKENS and fits(high):
            low, high = high, 2 * high
        while high - low > max(low // 16, LEAST_TOKENS):
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
    except RuntimeError as error:
        return {"error": str(error), "tokens": low, "tried": tried}
    return {"tokens": low, "tried": tried}


def compare(cases: list[dict], dtype: str) -> None:
    """Adds to each case its ratios to eager and whether it computed the same."""
    eager = next((case for case in cases if case["head"] == "eager" and "seconds" in case), None)
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


def print_report(report: dict) -> None:
    settings = report["settings"]
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print("update: " + ", ".join(f"{key} {value}" for key, value in settings.items() if value is not None))
    console.print(", ".join(f"{key} {value}" for key, value in report["machine"].items()))
    console.print(
        f"MFU of {report['roof']['tflops']:.3g} TFLOP/s ({report['roof']['source']}); `mssr plan` predicts "
        f"{report['predicted_gib']:.2f} GiB for mssr"
    )
    print_cases(report["cases"], console)


def print_cases(cases: list[dict], console: Console) -> None:
    model = next((case for case in cases if "seconds" in case), None)
    if model:
        console.print(
            f"{model['parameters']:,} parameters, {model['trained']:,} trained, {model['layers']} layers, vocabulary "
            f"{model['vocabulary']:,}; {model['response_tokens']:,} response tokens, {model['patches']:,} patches of images"
        )
    table = Table("head", box=None, padding=(0, 2))
    for name in (
        "seconds",
        "to eager",
        "passes",
        "AdamW",
        "tokens/s",
        "MFU",
        "peak GiB",
        "extra",
        "to eager",
        "differs",
    ):
        table.add_column(name, justify="right")
    if any("longest" in case for case in cases):
        table.add_column("longest", justify="right")
    for case in cases:
        table.add_row(case["head"], *columns(case))
    console.print(table)
    for case in cases:
        if "seconds" not in case:
            output = "" if "skipped" in case else "\n" + case["output"][-1500:]
            console.print(f"{case['head']}: {case.get('error') or 'skipped: ' + case['skipped']}{output}", markup=False)


def columns(case: dict) -> list[str]:
    most = [f"{case['longest']['tokens']:,}"] if "longest" in case else []
    if "seconds" not in case:
        return ["skipped" if "skipped" in case else "failed", *[""] * 9, *most]
    low, high = case["seconds_spread"]
    ratio = lambda name: f"{case[name]:.3f}" if name in case else ""  # noqa: E731
    differs = f"{case['differs']:.0e}" + ("" if case["agrees"] else " TOO MUCH") if "differs" in case else ""
    return [
        f"{case['seconds']:.3f} ({low:.3f}..{high:.3f})",
        ratio("time_ratio"),
        f"{case['forward_backward_seconds']:.3f}",
        f"{case['optimizer_seconds']:.3f}",
        f"{case['tokens_per_second']:,.0f}",
        f"{case['mfu']:.1%}",
        f"{case['peak_gib']:.2f}",
        f"{case['extra_gib']:.2f}",
        ratio("extra_ratio"),
        differs,
        *most,
    ]


if __name__ == "__main__":
    main()
