"""The weight sync, trainer to vLLM in the same process: time and peak extra memory, by parameters and ZeRO stage.

    python -m bench.sync [--sizes tiny 20m 100m 500m | --model 7b] [--modes zero0 zero2 zero3] [--ranks 2] [--json FILE]

Models: Qwen2.5-VL with random weights. zero0 is the policy alone, on one rank; zero2 and zero3 are in the trainer's DeepSpeed
engine, on `--ranks` ranks. Each (size, mode) runs in processes of its own; the slowest and the largest rank count.
Time: `update_weights` from when all ranks are ready until it returns, after `release` as in training: on CUDA it includes
waking vLLM's memory. The first sync is a warm-up. GB/s: of the whole model, which every rank's vLLM receives.
Memory: the peak during a sync beyond what trainer and vLLM hold between syncs, the largest of `--repeats` syncs after the
timed ones. On a CPU the peak of the resident set, with freed memory given back at once. On CUDA the larger of what the
allocator handed out and what the device lost, with vLLM awake before, so that its own weights and cache do not count.
`gathered` is `named_weights` alone, which is what ZeRO-3 gathers; the rest is vLLM's, which loads and repacks layer by layer.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from mssr.config.resolve import why_no_vllm

from . import report as report_of
from . import tables
from .child import result
from .machine import available_bytes
from .memory import GIB
from .sync_case import SIZES

MODES = ("zero0", "zero2", "zero3")
CASE_LIMIT = 1200  # seconds


def main(words: list[str] | None = None) -> int:
    arguments = parse_arguments(words)
    report = measure(arguments, words)
    report_of.show(tables.sync(report))
    report_of.save(report, arguments.json)
    return int(any("error" in case for case in report["cases"]))


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    models = parser.add_mutually_exclusive_group()
    models.add_argument("--sizes", nargs="+", choices=SIZES, default=["tiny", "20m", "100m"], metavar="SIZE")
    models.add_argument("--model", choices=("7b",), help="the dimensions of Qwen2.5-VL-7B, for a GPU")
    parser.add_argument("--modes", nargs="+", choices=MODES, help="default: all; for the 7b zero0")
    parser.add_argument("--ranks", type=int, help="for zero2 and zero3; default: 2, on CUDA one per device")
    parser.add_argument("--sync-gib", type=float, default=1.0, help="the most that ZeRO-3 gathers at once")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32, on CUDA bfloat16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    arguments = parser.parse_args(words)
    if arguments.model:
        arguments.sizes = [arguments.model]
    on_gpu = arguments.device == "cuda"
    arguments.modes = arguments.modes or (["zero0"] if arguments.model else list(MODES))
    arguments.ranks = arguments.ranks or (torch.cuda.device_count() if on_gpu else 2)
    arguments.dtype = arguments.dtype or ("bfloat16" if on_gpu else "float32")
    return arguments


def measure(arguments: argparse.Namespace, words: list[str] | None = None, limit: float = CASE_LIMIT) -> dict:
    """Return the report. limit: seconds for each case."""
    settings = {key: getattr(arguments, key) for key in ("dtype", "sync_gib", "repeats")}
    report = report_of.new("bench.sync", words, arguments.device, settings)
    for size in arguments.sizes:
        for mode in arguments.modes:
            case = {"size": size, "mode": mode, "ranks": 1 if mode == "zero0" else arguments.ranks}
            why = why_not(case, arguments)
            found = {"skipped": why} if why else run(case | settings | {"device": arguments.device}, limit)
            if "error" in found:
                print(f"{size} {mode}: {found['error']}\n{found['output']}", file=sys.stderr)
            report["cases"].append(case | found)
    return report


def why_not(case: dict, arguments: argparse.Namespace) -> str | None:
    """Return why this case is not run here: a machine out of memory would kill other work too."""
    if why := why_no_vllm(arguments.device):
        return why
    if case["size"] == "7b" and case["mode"] != "zero0":
        return "needs the weights as files, which only zero0 does without"
    if arguments.device == "cuda":
        return None
    needed, available = needed_bytes(case, arguments.dtype), available_bytes()
    if needed > 0.9 * available:
        return f"needs about {needed / GIB:.0f} GiB of memory, {available / GIB:.0f} are available"
    return None


def needed_bytes(case: dict, dtype: str) -> float:
    """Estimate, from measurements: the policy, the engine's flat copies, vLLM's weights, the first sync and the heap."""
    ranks, (parameters, _) = case["ranks"], SIZES[case["size"]]
    copies = {"zero0": 3, "zero2": 4 + 1 / ranks, "zero3": 4 + 3 / ranks}[case["mode"]]
    return ranks * (1.9 * GIB + copies * parameters * getattr(torch, dtype).itemsize)


def run(case: dict, limit: float) -> dict:
    """Return what the first rank measured, or the error of a rank that failed."""
    changes = {}
    if case["device"] == "cpu":  # the ranks share the cores; vLLM allocates its cache when it starts
        changes = {"OMP_NUM_THREADS": max(1, torch.get_num_threads() // case["ranks"]), "VLLM_CPU_KVCACHE_SPACE": 1}
    with tempfile.TemporaryDirectory(prefix="mssr_sync_") as folder:
        case = case | {"folder": folder + "/model"}
        return result("bench.sync_case", case, limit=limit, ranks=case["ranks"], **changes)


if __name__ == "__main__":
    sys.exit(main())
