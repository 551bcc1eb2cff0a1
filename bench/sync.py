"""The weight sync, trainer to vLLM in the same process: time and peak extra memory against parameters and ZeRO stage.

    python -m bench.sync [--sizes tiny 20m 100m 500m | --model 7b] [--modes zero0 zero2 zero3] [--ranks 2] [--json FILE]

Models: Qwen2.5-VL of random weights. zero0 is the policy alone, on one rank; zero2 and zero3 are in the trainer's DeepSpeed
engine, on `--ranks` ranks. Each (size, mode) runs in processes of its own; of the ranks the slowest and the largest count.
Time: `update_weights` from when all ranks are ready to when it returns, after `release` as in training: on CUDA it includes
waking vLLM's memory. The first sync is a warm-up. Bytes/s: those of the whole model, which every rank's vLLM receives.
Memory: the peak during a sync beyond what trainer and vLLM hold between syncs, the largest of `--repeats` syncs after the
timed ones. On a CPU the peak of the resident set: `extra` where the heap is trimmed after every weight, which is what the
sync needs; `with heap` where it is not, and glibc keeps part of what each layer freed. On CUDA the larger of what the
allocator handed out and what the device lost, with vLLM awake before, so that its own weights and cache are not in it.
`gathered` is `named_weights` alone: what ZeRO-3 gathers; the rest is vLLM's, a layer at a time as it loads and repacks it.
Per-parameter way: one gathering and one call of `load_weights` a parameter, as trainers commonly do it, up to 100m. It takes
turns with ours, and the ratio of the times (below 1: ours is faster) is the median of the ratios within a turn.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from . import machine
from .sync_case import GIB, SIZES

ROOT = Path(__file__).resolve().parents[1]
MODES = ("zero0", "zero2", "zero3")
PER_PARAMETER_UP_TO = 2e8  # parameters; beyond, the comparison takes long and says the same
CASE_LIMIT = 1200  # seconds


def main():
    arguments = parse_arguments()
    report = measure(arguments)
    print_report(report)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=2) + "\n")


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    models = parser.add_mutually_exclusive_group()
    models.add_argument("--sizes", nargs="+", choices=SIZES, default=["tiny", "20m", "100m"], metavar="SIZE")
    models.add_argument("--model", choices=("7b",), help="the dimensions of Qwen2.5-VL-7B, for a GPU")
    parser.add_argument("--modes", nargs="+", choices=MODES, help="default: all; of the 7b zero0")
    parser.add_argument("--ranks", type=int, help="of zero2 and zero3; default: 2, on CUDA one a device")
    parser.add_argument("--sync-gib", type=float, default=1.0, help="what ZeRO-3 gathers at once")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32, on CUDA bfloat16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    arguments = parser.parse_args(words)
    if arguments.model:
        arguments.sizes = [arguments.model]
    on_gpu = arguments.device == "cuda"
    arguments.modes = arguments.modes or (["zero0"] if arguments.model else list(MODES))
    arguments.ranks = arguments.ranks or (torch.cuda.device_count() if on_gpu else 2)
    arguments.dtype = arguments.dtype or ("bfloat16" if on_gpu else "float32")
    return arguments


def measure(arguments: argparse.Namespace) -> dict:
    cases = []
    for size in arguments.sizes:
        for mode in arguments.modes:
            case = {"size": size, "mode": mode, "ranks": 1 if mode == "zero0" else arguments.ranks}
            why = why_not(case, arguments)
            found = {"skipped": why} if why else run(case, arguments)
            cases.append(case | found)
    settings = {key: getattr(arguments, key) for key in ("dtype", "sync_gib", "repeats")}
    return {"settings": settings, "machine": machine.facts(arguments.device), "cases": cases}


def why_not(case: dict, arguments: argparse.Namespace) -> str | None:
    """Why this case is not run here. A machine out of memory would end other work than ours."""
    if case["size"] == "7b" and case["mode"] != "zero0":
        return "needs the weights as files, which only the policy alone does without"
    if arguments.device == "cuda":
        return None
    needed, available = needed_bytes(case, arguments.dtype), available_bytes()
    if needed > 0.9 * available:
        return f"needs about {needed / GIB:.0f} GiB of memory, {available / GIB:.0f} are available"
    return None


def needed_bytes(case: dict, dtype: str) -> float:
    """As measured: the policy, the engine's flat copies of it, vLLM's weights, what the first sync and the heap add."""
    ranks = case["ranks"]
    copies = {"zero0": 3, "zero2": 4 + 1 / ranks, "zero3": 4 + 3 / ranks}[case["mode"]]
    return ranks * (1.9 * GIB + copies * SIZES[case["size"]].about * getattr(torch, dtype).itemsize)


def available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable: memory can only be measured on Linux")


def run(case: dict, arguments: argparse.Namespace) -> dict:
    """What the first rank prints, or the error of a rank that failed."""
    ranks = case["ranks"]
    with tempfile.TemporaryDirectory(prefix="mssr_sync_") as folder, socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        listener.close()
        settings = {key: getattr(arguments, key) for key in ("device", "dtype", "sync_gib", "repeats")}
        compared = SIZES[case["size"]].about <= PER_PARAMETER_UP_TO
        words = json.dumps(case | settings | {"folder": folder + "/model", "per_parameter": compared})
        common = {"WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        if arguments.device == "cpu":  # ranks that share the cores; vLLM pages its cache in when it starts
            common |= {"OMP_NUM_THREADS": max(1, torch.get_num_threads() // ranks), "VLLM_CPU_KVCACHE_SPACE": 1}
        processes, logs = [], [Path(folder) / f"{rank}.log" for rank in range(ranks)]
        try:
            for rank, log in enumerate(logs):
                own = {key: str(value) for key, value in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()}
                with log.open("w") as stream:
                    command = [sys.executable, "-m", "bench.sync_case", words]
                    options = dict(stdout=stream, stderr=subprocess.STDOUT, env=os.environ | own, cwd=ROOT)
                    processes.append(subprocess.Popen(command, **options))
            failed = first_failure(processes)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        output = logs[failed or 0].read_text()
    result = [line for line in output.splitlines() if line.startswith('{"')]
    if failed is None and result:
        return json.loads(result[-1])
    return {"error": f"rank {failed or 0} failed", "output": output[-3000:]}


def first_failure(processes: list[subprocess.Popen]) -> int | None:
    """The rank that ended badly first, or, where they hang, the first still running; None: all ended well."""
    deadline = time.monotonic() + CASE_LIMIT
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        bad = [rank for rank, code in enumerate(codes) if code]
        if bad or all(code == 0 for code in codes):
            return bad[0] if bad else None
        time.sleep(0.1)
    return next((rank for rank, process in enumerate(processes) if process.poll() is None), None)


def print_report(report: dict):
    print(f"weight sync: {' '.join(f'{key} {value}' for key, value in report['settings'].items())}")
    print(", ".join(f"{key} {value}" for key, value in report["machine"].items()))
    print(
        "sync: median (min..max); extra: peak beyond what is held between syncs, and what gathering alone takes of it\n"
    )
    columns = f"{'sync ms':>26}{'GB/s':>8}{'extra MiB':>11}{'gathered':>10}{'with heap':>11}{'x per-parameter way':>21}"
    print(f"{'size':<6}{'parameters':>14}{'MB':>8}  {'mode':<9}{columns}")
    for case in report["cases"]:
        mode = f"{case['mode']} x{case['ranks']}"
        if "seconds" not in case:
            why = f"skipped: {case['skipped']}" if "skipped" in case else f"{case['error']}\n{case['output'][-1500:]}"
            print(f"{case['size']:<6}{'':>22}  {mode:<9}  {why}")
            continue
        low, high = (f"{1e3 * seconds:.1f}" for seconds in case["seconds_spread"])
        spread = f"{1e3 * case['seconds']:.1f} ({low}..{high})"
        ratio = f"{case['per_parameter']['time_ratio']:.2f}" if "per_parameter" in case else ""
        print(
            f"{case['size']:<6}{case['parameters']:>14,}{case['bytes'] / 1e6:>8.0f}  {mode:<9}{spread:>26}"
            f"{case['bytes_per_second'] / 1e9:>8.2f}{case['peak_extra_mib']:>11.1f}"
            f"{case['peak_extra_mib_of_gathering']:>10.1f}{case['peak_extra_mib_with_heap']:>11.1f}{ratio:>21}"
        )


if __name__ == "__main__":
    main()
