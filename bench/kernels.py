"""Policy loss of the head, forward and backward: the chunked kernels against the eager reference.

    python -m bench.kernels [--n 2048 --d 1024 --v 65536 --dtype float32 --repeats 5 --json FILE]

Time: the backends take turns, and the figure is the median over the turns of the ratio within a turn, so that a busy
machine slows both. Memory: the peak during forward and backward beyond what the inputs take, the gradients included,
each backend in a process of its own on the CPU (resident set) and from the allocator on CUDA.
Every row carries an advantage: zero-advantage rows, which the kernels skip, would only flatter them.
"""

import argparse
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from mssr_kernels import linear_logprob_entropy, linear_policy_loss

BACKENDS = ("reference", "chunked")
MIB = 1 << 20


def main():
    arguments = parse_arguments()
    torch.manual_seed(arguments.seed)
    if arguments.measure_memory:
        print(json.dumps(peak_extra_bytes(make_inputs(arguments), arguments.measure_memory)))
        return

    memory = {backend: memory_in_own_process(backend) for backend in BACKENDS} if arguments.device == "cpu" else {}
    inputs = make_inputs(arguments)
    if arguments.device == "cuda":
        memory = {backend: peak_extra_bytes(inputs, backend) for backend in BACKENDS}
    seconds, difference = time_and_compare(inputs, arguments.repeats)
    report = {
        "shape": {"n": arguments.n, "d": arguments.d, "v": arguments.v, "dtype": arguments.dtype},
        "machine": machine(arguments.device),
        "mean_entropy": inputs["mean_entropy"],
        "peak_extra_mib": {backend: memory[backend] / MIB for backend in BACKENDS},
        "seconds": {backend: statistics.median(seconds[backend]) for backend in BACKENDS},
        "memory_ratio": memory["chunked"] / memory["reference"],
        "time_ratio": statistics.median(c / r for c, r in zip(seconds["chunked"], seconds["reference"])),
        "max_gradient_difference": difference,
    }
    print_report(report)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, default=2048, help="tokens")
    parser.add_argument("--d", type=int, default=1024, help="hidden size")
    parser.add_argument("--v", type=int, default=65536, help="vocabulary")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--measure-memory", choices=BACKENDS, help=argparse.SUPPRESS)
    return parser.parse_args()


def make_inputs(arguments: argparse.Namespace) -> dict:
    """Peaked rows: logits of unit variance, from which the target's stands out by 4 to 24."""
    n, d, v = arguments.n, arguments.d, arguments.v
    dtype, device = getattr(torch, arguments.dtype), arguments.device
    weight = torch.randn(v, d, device=device)
    target = torch.randint(v, (n,), device=device)
    margin = 4 + 20 * torch.rand(n, 1, device=device)
    hidden = torch.randn(n, d, device=device) / d**0.5 + margin * weight[target] / d
    weight, hidden = weight.to(dtype).requires_grad_(), hidden.to(dtype).requires_grad_()
    with torch.no_grad():
        now = linear_logprob_entropy(hidden, weight, target)
    return {
        "hidden": hidden,
        "weight": weight,
        "target": target,
        "advantage": torch.randn(n, device=device),
        "old_logp": now.logp + 0.05 * torch.randn(n, device=device),
        "mean_entropy": now.entropy.mean().item(),
    }


def forward_backward(inputs: dict, backend: str):
    inputs["hidden"].grad = inputs["weight"].grad = None
    linear_policy_loss(
        inputs["hidden"], inputs["weight"], inputs["target"], inputs["advantage"], inputs["old_logp"], backend=backend
    ).loss.backward()


def time_and_compare(inputs: dict, repeats: int) -> tuple[dict, dict]:
    """Seconds of every turn by backend; the largest gradient difference, relative to the largest gradient."""
    difference, gradients = {}, {}
    for backend in BACKENDS:  # also the warm-up
        forward_backward(inputs, backend)
        gradients[backend] = {name: inputs[name].grad for name in ("hidden", "weight")}
    for name in ("hidden", "weight"):
        expected, got = (gradients[backend].pop(name).float() for backend in BACKENDS)
        difference[name] = (got.sub_(expected).abs_().max() / expected.abs_().max()).item()
    del expected, got

    seconds = {backend: [] for backend in BACKENDS}
    for _ in range(repeats):
        for backend in BACKENDS:
            synchronize(inputs)
            start = time.perf_counter()
            forward_backward(inputs, backend)
            synchronize(inputs)
            seconds[backend].append(time.perf_counter() - start)
    return seconds, difference


def peak_extra_bytes(inputs: dict, backend: str) -> int:
    gc.collect()
    if inputs["hidden"].is_cuda:
        inputs["hidden"].grad = inputs["weight"].grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward_backward(inputs, backend)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present resident set
    before = resident_bytes("VmRSS")
    forward_backward(inputs, backend)
    return resident_bytes("VmHWM") - before


def memory_in_own_process(backend: str) -> int:
    command = [sys.executable, "-m", "bench.kernels", *sys.argv[1:], "--measure-memory", backend]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def resident_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: memory can only be measured on Linux")


def synchronize(inputs: dict):
    if inputs["hidden"].is_cuda:
        torch.cuda.synchronize()


def machine(device: str) -> dict:
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(
            (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine()
        )
        name = f"{model}, {torch.get_num_threads()} threads"
    return {"device": name, "torch": torch.__version__, "python": platform.python_version()}


def print_report(report: dict):
    shape = report["shape"]
    print(f"linear_policy_loss, forward + backward: {' '.join(f'{key} {value}' for key, value in shape.items())}")
    print(", ".join(f"{key} {value}" for key, value in report["machine"].items()))
    print(f"mean entropy of the rows {report['mean_entropy']:.2f} nats\n")
    flops = 6 * shape["n"] * shape["d"] * shape["v"]  # the least an exact gradient needs
    print(f"{'backend':<12}{'seconds':>10}{'GFLOP/s':>10}{'peak extra MiB':>17}")
    for backend in BACKENDS:
        seconds = report["seconds"][backend]
        print(f"{backend:<12}{seconds:>10.3f}{flops / seconds / 1e9:>10.0f}{report['peak_extra_mib'][backend]:>17.0f}")
    print(f"{'ratio':<12}{report['time_ratio']:>10.3f}{'':>10}{report['memory_ratio']:>17.3f}")
    differences = ", ".join(f"d{name} {value:.1e}" for name, value in report["max_gradient_difference"].items())
    print(f"\nlargest gradient difference, relative to the largest gradient: {differences}")


if __name__ == "__main__":
    main()
