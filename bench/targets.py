"""What the figures of `bench.gpu` mean: rates and shares of the roof, and the project's targets beside them."""

from typing import NamedTuple

from .roofs import share

GIB = 1 << 30
TARGET_MODEL = "qwen2.5-vl-7b"
# Those that hold dW in float32 until it is handed out (QuACK: of more than one chunk, 4,096 tokens).
SUMMED_IN_FLOAT32 = ("mssr exact", "mssr sparse", "mssr chunked exact", "trl", "quack CE")


class Target(NamedTuple):
    """What is asked for, or said of a peer: 7B head, bf16, N 8192, one H200. Rows are realistic unless said otherwise."""

    what: str
    memory: str
    time: str
    provider: str | None = None  # None: no head, so that nothing below measures it
    rows: str = "realistic"
    most_ms: float | None = None
    most_forward_ms: float | None = None
    most_gib: float | None = None  # beyond dW: as it is accumulated and as it is handed out


TARGETS = (
    Target("eager, log-prob + entropy in fp32", "15-20 GiB", "55-75 ms (estimate)", "eager"),
    Target("torch.compile of it", "7-9 GiB", "about 45 ms (estimate)", "torch.compile"),
    Target("Liger GRPO", "~3 GiB + dW", "154 ms (published, CE, D 4096)", "liger GRPO"),
    Target("Liger fused linear CE", "~3 GiB + dW", "154 ms (published, CE, D 4096)", "liger CE"),
    Target("verl Triton linear_cross_entropy", "0.3 GiB + dW", "75-80 ms (from published rates)", "verl"),
    Target("Apple CCE, exact", "fp32 dH, dW", ">= 100 ms (estimate)", "cce exact"),
    Target("Liger CuTe (Hopper only, bf16 entropy)", "0.3 GiB + dW", "~52 ms (from published rates)", "liger scaled CE"),
    Target("QuACK CE (no entropy, no RL)", "1.2 GiB + dW", "~37 ms (from published rates)", "quack CE"),
    Target(
        "ours, recompute", "<= 256 MiB + dW", "<= 57 ms, stretch 52; forward <= 16 ms", "mssr recompute",
        most_ms=57, most_forward_ms=16, most_gib=0.25,
    ),
    Target("ours, exact", "<= 0.6 GiB + fp32 dW", "<= 43 ms, stretch 39", "mssr exact", most_ms=43, most_gib=0.6),
    Target("ours, sparse, peaked rows", "as exact", "<= 22 ms", "mssr sparse", rows="peaked", most_ms=22, most_gib=0.6),
)  # fmt: skip

# The trainer and vLLM in one process on one GPU; the memory is beyond what the two hold between syncs.
SYNC = Target("weight sync, 7B colocated", "<= 1.1 GiB extra", "<= 1 s", most_ms=1000, most_gib=1.1)


def with_rates(case: dict, roofs: dict | None) -> dict:
    """TFLOP/s and the share of the roof for each provider; for "loss" the memory beyond dW."""
    for name, result in case["providers"].items():
        if "seconds" not in result:
            continue
        result["tflops"] = result["flops"] / result["seconds"] / 1e12
        if roofs:
            result["share_of_roof"] = share(result["flops"], result["bytes"], result["seconds"], case["dtype"], roofs)
        if case["task"] == "loss":
            weight_bytes = 2  # bf16, handed out
            if name in SUMMED_IN_FLOAT32:
                weight_bytes += 4
            result["beyond_dw_gib"] = result["peak_extra_mib"] / 1024 - case["v"] * case["d"] / GIB * weight_bytes
    return case


def beside_targets(measurements: list[dict], sync: dict | None) -> list[dict]:
    """measurements: cases of `bench.kernels`, `with_rates`."""
    lines = [beside(target, measurements) for target in TARGETS]
    line = {"what": "ours, sparse, flat rows", "memory": "", "time": "<= 1.15x exact", "measured": "not run"}
    flat = providers_of(measurements, "loss", "flat")
    if all("seconds" in flat.get(name, {}) for name in ("mssr sparse", "mssr exact")):
        ratio = flat["mssr sparse"]["seconds"] / flat["mssr exact"]["seconds"]
        line |= {"measured": f"{ratio:.2f}x", "met": ratio <= 1.15}
    return [*lines, line, beside_sync(sync)]


def providers_of(measurements: list[dict], task: str, rows: str) -> dict[str, dict]:
    """At the shape of the targets. One case may have been measured in parts, each with some of the providers."""
    found = {}
    for case in measurements:
        if (case["model"], case["n"], case["task"], case["rows"]) == (TARGET_MODEL, 8192, task, rows):
            found = case["providers"] | found
    return found


def beside(target: Target, measurements: list[dict]) -> dict:
    line = {"what": target.what, "memory": target.memory, "time": target.time, "measured": "not run"}
    result = providers_of(measurements, "loss", target.rows).get(target.provider)
    if result is None:
        return line
    if "seconds" not in result:
        return line | {"measured": f"failed: {result['error']}"}
    ms, gib = result["seconds"] * 1e3, result["beyond_dw_gib"]
    words, checks = f"{ms:.1f} ms, {gib:.2f} GiB", limits(target, ms, gib)
    forward = providers_of(measurements, "forward", target.rows).get("mssr forward", {})
    if target.most_forward_ms and "seconds" in forward:
        checks["forward_met"] = forward["seconds"] * 1e3 <= target.most_forward_ms
        words += f", forward {forward['seconds'] * 1e3:.1f} ms"
    return line | {"measured": words + verdict(checks), "ms": ms, "gib_beyond_dw": gib, **checks}


def beside_sync(found: dict | None) -> dict:
    """found: a case of `bench.sync`."""
    line = {"what": SYNC.what, "memory": SYNC.memory, "time": SYNC.time}
    if found is None:
        return line | {"measured": "not run"}
    if "seconds" not in found:
        return line | {"measured": f"skipped: {found['skipped']}" if "skipped" in found else "failed"}
    ms, gib = found["seconds"] * 1e3, found["peak_extra_mib"] / 1024
    checks = limits(SYNC, ms, gib)
    return line | {"measured": f"{ms:.1f} ms, {gib:.2f} GiB{verdict(checks)}", "ms": ms, "gib_extra": gib, **checks}


def limits(target: Target, ms: float, gib: float) -> dict:
    checks = {}
    if target.most_ms:
        checks["time_met"] = ms <= target.most_ms
    if target.most_gib:
        checks["memory_met"] = gib <= target.most_gib
    return checks


def verdict(checks: dict) -> str:
    missed = ", ".join(name.removesuffix("_met") for name, met in checks.items() if not met)
    return f": {'missed ' + missed if missed else 'met'}" if checks else ""
