"""The policy loss fused with the head, forward and backward, against eager PyTorch and what else does the job.

    python -m bench.kernels [--n 2048 --d 1024 --v 65536 --dtype float32 --rows peaked --repeats 5 --json FILE]

Time: the providers take turns, and a ratio is the median of the ratios within a turn, so that a busy machine slows both.
Ratios have two bases: eager as lean as it can be written, and the package's own eager reference with all its options.
Memory: the peak during forward and backward beyond what the inputs take, the gradients included; each provider in a
process of its own on the CPU (resident set), from the allocator on CUDA. A provider that fails is listed with its error.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from . import inputs, machine
from .providers import GPU_ONLY, PROVIDERS

MIB = 1 << 20
SHAPES = {"3b": (2048, 151936), "7b": (3584, 152064)}  # (D, V) of Qwen2.5-VL


def main():
    arguments = parse_arguments()
    if arguments.measure_memory:
        print(json.dumps(peak_extra_bytes(make(arguments), arguments.measure_memory, arguments)))
        return
    report = measure(arguments)
    print_report(report)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=2) + "\n")


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=sorted(SHAPES), help="D and V of a Qwen2.5-VL head")
    parser.add_argument("--n", type=int, default=2048, help="tokens")
    parser.add_argument("--d", type=int, default=1024, help="hidden size")
    parser.add_argument("--v", type=int, default=65536, help="vocabulary")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--rows", choices=sorted(inputs.KINDS), default="peaked")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, metavar="NAME", help="those only; eager always")
    parser.add_argument("--workspace-mib", type=int, default=256)
    parser.add_argument("--vocab-drop-tol", type=float, default=2.0**-8, help="of mode S")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--measure-memory", choices=PROVIDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.model:
        arguments.d, arguments.v = SHAPES[arguments.model]
    return arguments


def make(arguments: argparse.Namespace) -> inputs.Inputs:
    dtype = getattr(torch, arguments.dtype)
    return inputs.make(arguments.n, arguments.d, arguments.v, dtype, arguments.device, arguments.rows, arguments.seed)


def measure(arguments: argparse.Namespace) -> dict:
    """Everything about one shape and kind of rows."""
    names = [name for name in PROVIDERS if name in (arguments.providers or PROVIDERS) or name == "eager"]
    if arguments.device == "cpu":
        names = [name for name in names if name not in GPU_ONLY]
    results = {name: {"work": PROVIDERS[name].work} for name in names}
    tensors, failed = make(arguments), {}
    gradients = {}
    for name in names:  # also the warm-up
        try:
            run(tensors, name, arguments)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
            continue
        gradients[name] = difference(tensors, gradients.get("eager"))
        if name == "eager":
            gradients[name] = [tensors.hidden.grad.float(), tensors.weight.grad.float()]
        elif PROVIDERS[name].work == PROVIDERS["eager"].work:
            results[name]["gradient_difference"] = dict(zip(("hidden", "weight"), gradients[name]))
    gradients.clear()
    names = [name for name in names if name not in failed]

    seconds = {name: [] for name in names}
    for _ in range(arguments.repeats):
        for name in names:
            seconds[name].append(run(tensors, name, arguments))
    mean_entropy = tensors.mean_entropy
    memory = {name: peak_extra_bytes(tensors, name, arguments) for name in names} if arguments.device == "cuda" else {}
    del tensors
    for name in names:
        bytes_ = memory.get(name) or memory_in_own_process(name)
        memory[name] = bytes_
        results[name] |= {
            "seconds": statistics.median(seconds[name]),
            "seconds_spread": [min(seconds[name]), max(seconds[name])],
            "peak_extra_mib": bytes_ / MIB,
        }
    for name in names:
        for base, suffix in (("eager", ""), ("mssr reference", "_to_reference")):
            if base in names:
                turns = [ours / theirs for ours, theirs in zip(seconds[name], seconds[base])]
                results[name]["time_ratio" + suffix] = statistics.median(turns)
                results[name]["memory_ratio" + suffix] = memory[name] / memory[base]
    for name, error in failed.items():
        results[name]["error"] = error
    shape = {key: getattr(arguments, key) for key in ("n", "d", "v", "dtype", "rows")}
    settings = {key: getattr(arguments, key) for key in ("workspace_mib", "vocab_drop_tol", "repeats", "seed")}
    return {
        "shape": shape,
        "settings": settings,
        "machine": machine.facts(arguments.device),
        "mean_entropy": mean_entropy,
        "providers": results,
    }


def run(tensors: inputs.Inputs, name: str, arguments: argparse.Namespace) -> float:
    """Seconds of a forward and backward pass."""
    tensors.hidden.grad = tensors.weight.grad = None
    synchronize(arguments)
    start = time.perf_counter()
    PROVIDERS[name].loss(tensors, arguments.workspace_mib * MIB, arguments.vocab_drop_tol).backward()
    synchronize(arguments)
    return time.perf_counter() - start


def difference(tensors: inputs.Inputs, eager: list | None) -> list[float] | None:
    """Norm of the difference to eager's gradients, relative to the norm of these."""
    if eager is None:
        return None
    got = (tensors.hidden.grad, tensors.weight.grad)
    return [((a.float() - b).norm() / b.norm()).item() for a, b in zip(got, eager)]


def peak_extra_bytes(tensors: inputs.Inputs, name: str, arguments: argparse.Namespace) -> int:
    gc.collect()
    if arguments.device == "cuda":
        tensors.hidden.grad = tensors.weight.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(tensors, name, arguments)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present resident set
    before = resident_bytes("VmRSS")
    run(tensors, name, arguments)
    return resident_bytes("VmHWM") - before


def memory_in_own_process(name: str) -> int:
    command = [sys.executable, "-m", "bench.kernels", *sys.argv[1:], "--measure-memory", name]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def resident_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: memory can only be measured on Linux")


def synchronize(arguments: argparse.Namespace):
    if arguments.device == "cuda":
        torch.cuda.synchronize()


def print_report(report: dict):
    shape = report["shape"]
    print(f"forward + backward: {' '.join(f'{key} {value}' for key, value in shape.items())}")
    print(", ".join(f"{key} {value}" for key, value in report["machine"].items()))
    print(f"mean entropy of the rows {report['mean_entropy']:.2f} nats; ratios are to eager, and to the reference\n")
    print(f"{'':<26}{'seconds':>9}{'ratios':>14}{'MiB':>7}{'ratios':>14}   gradients differ by  work")
    for name, result in report["providers"].items():
        if "error" in result:
            print(f"{name:<26}failed: {result['error']}")
            continue
        differs = ", ".join(f"{key[0]} {value:.0e}" for key, value in result.get("gradient_difference", {}).items())
        time_ratios, memory_ratios = (
            "".join(
                f"{result[kind + suffix]:>7.3f}" if kind + suffix in result else "" for suffix in ("", "_to_reference")
            )
            for kind in ("time_ratio", "memory_ratio")
        )
        print(
            f"{name:<26}{result['seconds']:>9.4f}{time_ratios:>14}{result['peak_extra_mib']:>7.0f}{memory_ratios:>14}"
            f"   {differs:<20} {result['work']}"
        )


if __name__ == "__main__":
    main()
