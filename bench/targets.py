"""What the figures of `bench.gpu` mean: rates and shares of the roof, and the project's targets beside them."""

from typing import NamedTuple

GIB = 1 << 30


class Target(NamedTuple):
    """What is asked for, or said of a peer: 7B head, bf16, N 8192, one H200. Rows are realistic unless said otherwise."""

    what: str
    memory: str
    time: str
    provider: str | None = None  # None: not measured here
    rows: str = "realistic"
    most_ms: float | None = None
    most_forward_ms: float | None = None
    most_gib: float | None = None  # beyond dW: as it is accumulated and as it is handed out


TARGETS = (
    Target("eager, log-prob + entropy in fp32", "15-20 GiB", "55-75 ms (estimate)", "eager"),
    Target("torch.compile of it", "7-9 GiB", "about 45 ms (estimate)", "torch.compile"),
    Target("Liger GRPO", "~3 GiB + dW", "154 ms (published, CE, D 4096)", "liger GRPO"),
    Target("Liger fused linear CE", "~3 GiB + dW", "154 ms (published, CE, D 4096)", "liger CE"),
    Target("verl Triton linear_cross_entropy", "0.3 GiB + dW", "75-80 ms (from published rates)"),
    Target("Apple CCE, exact", "fp32 dH, dW", ">= 100 ms (estimate)"),
    Target("Liger CuTe (Hopper only, bf16 entropy)", "0.3 GiB + dW", "~52 ms (from published rates)"),
    Target("QuACK CE (no entropy, no RL)", "1.2 GiB + dW", "~37 ms (from published rates)"),
    Target(
        "ours, G", "<= 256 MiB + dW", "<= 57 ms, stretch 52; forward <= 16 ms", "mssr G",
        most_ms=57, most_forward_ms=16, most_gib=0.25,
    ),
    Target("ours, L", "<= 0.6 GiB + fp32 dW", "<= 43 ms, stretch 39", "mssr L", most_ms=43, most_gib=0.6),
    Target("ours, S, peaked rows", "as L", "<= 22 ms", "mssr S", rows="peaked", most_ms=22, most_gib=0.6),
)  # fmt: skip

# The trainer and vLLM in one process on one GPU; the memory is beyond what the two hold between syncs.
SYNC = Target("weight sync, 7B colocated", "<= 1.1 GiB extra", "<= 1 s", most_ms=1000, most_gib=1.1)


def with_rates(report: dict, roofs: dict | None) -> dict:
    """FLOPs, TFLOP/s and the share of the roof for each provider."""
    n, d, v = (report["shape"][key] for key in "ndv")
    roof = roofs and roofs["matmul_tflops"]

    def rates(units: float, seconds: float) -> dict:
        tflops = units * n * d * v / seconds / 1e12
        return {"flops": units * n * d * v, "tflops": tflops, "share_of_roof": roof and tflops / roof}

    for name, result in report["providers"].items():
        if "seconds" in result:
            units = {"mssr G": 8, "mssr S": report["sparse"].get("units", 6)}.get(name, 6)
            result |= rates(units, result["seconds"])
            dw, work = v * d / GIB, 2  # bf16, handed out
            if name in ("mssr L", "mssr S", "mssr chunked L"):
                work += 4  # and float32, accumulated
            result["beyond_dw_gib"] = result["peak_extra_mib"] / 1024 - dw * work
    if "error" not in report["forward"]:
        report["forward"] = {
            backend: {"seconds": seconds, **rates(2, seconds)} for backend, seconds in report["forward"].items()
        }
    return report


def beside_targets(measurements: list[dict], sync: dict | None) -> list[dict]:
    found = {m["shape"]["rows"]: m for m in measurements if m["model"] == "7b" and m["shape"]["n"] == 8192}
    lines = []
    for target in TARGETS:
        line = {"what": target.what, "memory": target.memory, "time": target.time, "measured": "not measured here"}
        report = found.get(target.rows)
        if target.provider and report is None:
            line["measured"] = "not run"
        elif target.provider:
            line |= beside(target, report)
        lines.append(line)
    line = {"what": "ours, S, flat rows", "memory": "", "time": "<= 1.15x mode L", "measured": "not run"}
    flat = found.get("flat", {}).get("providers", {})
    if all("seconds" in flat.get(name, {}) for name in ("mssr S", "mssr L")):
        ratio = flat["mssr S"]["seconds"] / flat["mssr L"]["seconds"]
        line |= {"measured": f"{ratio:.2f}x", "met": ratio <= 1.15}
    return [*lines, line, beside_sync(sync)]


def beside(target: Target, report: dict) -> dict:
    result = report["providers"].get(target.provider, {"error": "not among the providers"})
    if "seconds" not in result:
        return {"measured": f"failed: {result.get('error')}"}
    ms, gib = result["seconds"] * 1e3, result["beyond_dw_gib"]
    words, checks = f"{ms:.1f} ms, {gib:.2f} GiB", limits(target, ms, gib)
    forward = report["forward"].get("triton")
    if target.most_forward_ms and forward:
        checks["forward_met"] = forward["seconds"] * 1e3 <= target.most_forward_ms
        words += f", forward {forward['seconds'] * 1e3:.1f} ms"
    return {"measured": words + verdict(checks), "ms": ms, "gib_beyond_dw": gib, **checks}


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


def show_measurement(report: dict):
    shape, sparse = report["shape"], report["sparse"]
    f = f"f of mode S {sparse['f']:.3f}" if "f" in sparse else f"f of mode S unknown: {sparse['error']}"
    print(
        f"\n{report['model']} head, N {shape['n']}, {shape['rows']} rows (mean entropy {report['mean_entropy']:.2f}), {f}"
    )
    print(f"{'':<26}{'ms':>8}{'to eager':>10}{'GiB':>8}{'- dW':>8}{'TFLOP/s':>9}{'of roof':>9}  gradients differ by")
    for name, result in report["providers"].items():
        if "error" in result:
            print(f"{name:<26}failed: {result['error']}")
            continue
        differs = ", ".join(f"{key[0]} {value:.0e}" for key, value in result.get("gradient_difference", {}).items())
        print(
            f"{name:<26}{result['seconds'] * 1e3:>8.1f}{result['time_ratio']:>10.3f}{result['peak_extra_mib'] / 1024:>8.2f}"
            f"{result['beyond_dw_gib']:>8.2f}{result['tflops']:>9.0f}{share(result):>9}  {differs}"
        )
    if "error" in report["forward"]:
        print(f"forward alone failed: {report['forward']['error']}")
        return
    for backend, result in report["forward"].items():
        print(
            f"{'forward, ' + backend:<26}{result['seconds'] * 1e3:>8.1f}{'':>26}{result['tflops']:>9.0f}{share(result):>9}"
        )


def share(result: dict) -> str:
    return f"{result['share_of_roof']:.0%}" if result["share_of_roof"] else ""
