"""The weight sync from the trainer to vLLM in the same process: time and peak extra memory, by model size and ZeRO stage.

    python -m bench.sync [--model tiny 20m 100m 500m 7b] [--modes zero0 zero2 zero3] [--ranks 2] [--json FILE]

Models: Qwen2.5-VL with random weights; 7b is for a GPU, and for zero0. zero0 is the policy alone, on one rank; zero2 and
zero3 are in the trainer's DeepSpeed engine, on `--ranks` ranks. Each (model, mode) runs in processes of its own; the slowest
and the largest rank count.
Time: `update_weights` from when all ranks are ready until it returns, after `release` as in training: on CUDA it includes
waking vLLM's memory. The first sync is a warm-up. GB/s: of the whole model, which every rank's vLLM receives.
Memory: the peak during a sync beyond what trainer and vLLM hold between syncs, the largest of `--repeats` syncs after the
timed ones. On a CPU the peak of the resident set, with freed memory given back at once. On CUDA the larger of what the
allocator handed out and what the device lost, with vLLM awake before, so that its own weights and cache do not count.
"""

import argparse
import itertools
import sys
import tempfile
from pathlib import Path

import torch

from mssr.cli import run_command
from mssr.config.resolve import why_no_vllm

from . import arguments as options
from . import models, room, tables
from . import report as report_of
from .child import result
from .room import Need

MODES = ("zero0", "zero2", "zero3")
CASE_LIMIT = 1200  # seconds


def main(words: list[str] | None = None) -> int:
    arguments = parse_arguments(words)
    report_of.refuse_other_file(arguments.json)
    report = measure(arguments, words)
    report_of.show(tables.sync(report))
    report_of.save(report, arguments.json)
    return int(any("error" in case for case in report["cases"]))


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = options.parser(__doc__)
    sizes = [*models.SMALL, "7b"]
    parser.add_argument(
        "--model", nargs="+", choices=sizes, default=["tiny", "20m", "100m"], help="default: %(default)s"
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="default: all")
    parser.add_argument(
        "--ranks", type=options.positive, help="for zero2 and zero3; default: 2, on CUDA one per device"
    )
    parser.add_argument("--repeats", type=options.positive, default=5, help="default: 5")
    options.add_dtype(parser, "float32", "bfloat16")
    options.add_device(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    arguments = parser.parse_args(words)
    arguments.ranks = arguments.ranks or (torch.cuda.device_count() if arguments.device == "cuda" else 2)
    arguments.dtype = arguments.dtype or options.default_dtype(arguments.device)
    return arguments


def measure(arguments: argparse.Namespace, words: list[str] | None = None, limit: float = CASE_LIMIT) -> dict:
    """Return the report. limit: seconds for each case."""
    settings = {key: getattr(arguments, key) for key in ("dtype", "repeats")}
    report = report_of.new("bench.sync", words, arguments.device, settings)
    cases = {
        (size, mode): {"size": size, "mode": mode, "ranks": 1 if mode == "zero0" else arguments.ranks}
        for size, mode in itertools.product(arguments.model, arguments.modes)
    }
    settings |= {"device": arguments.device}
    skipped = {key: why for key, case in cases.items() if (why := why_not(case, arguments.device))}
    skipped |= what_does_not_fit({key: case | settings for key, case in cases.items() if key not in skipped})
    for key, case in cases.items():
        found = {"skipped": skipped[key]} if key in skipped else run(case | settings, limit)
        report["cases"].append(case | found)
    return report


def what_does_not_fit(cases: dict[tuple[str, str], dict]) -> dict[tuple[str, str], str]:
    """Say the memory that the cases will take; return why a case does not fit. Exits with 2 if none fits."""
    if not cases:
        return {}
    from .estimate_models import sync_bytes  # imports for seconds; mistakes in the options show first

    words, way_out = "{size}, {mode}, ranks {ranks}", "take a smaller --model, or fewer --ranks"
    needs = {key: Need(words.format(**case), sync_bytes(case), lambda _: way_out) for key, case in cases.items()}
    return room.fitting(needs, next(iter(cases.values()))["device"], "case")[1]


def why_not(case: dict, device: str) -> str | None:
    """Return why this case does not run here; None if it does."""
    if case["size"] == "7b" and device == "cpu":
        return "needs a CUDA device"
    if case["size"] == "7b" and case["mode"] != "zero0":
        return "needs the weights as files, which only zero0 does without"
    return why_no_vllm(device)


def run(case: dict, limit: float) -> dict:
    """Return what the first rank measured, or the error of a rank that failed."""
    changes = {}
    if case["device"] == "cpu":  # the ranks share the cores; vLLM allocates its cache when it starts
        changes = {"OMP_NUM_THREADS": max(1, torch.get_num_threads() // case["ranks"]), "VLLM_CPU_KVCACHE_SPACE": 1}
    with tempfile.TemporaryDirectory(prefix="mssr_sync_") as folder:
        name = f"{case['size']} {case['mode']}"
        return result(name, "bench.sync_case", case | {"folder": folder + "/model"}, limit=limit, **changes)


if __name__ == "__main__":
    run_command(lambda: sys.exit(main()))
