"""Markdown of measured reports: tables, on what they were measured, and what they do not say."""

from collections.abc import Iterable

from .reports import facts, failed, is_ours, measured, mib, name, seconds, spoilt

NARROW = 1024  # narrower heads are no model's that is measured here
SYMBOLS = {"logp": "logp", "entropy": "H", "d_hidden": "dH", "d_weight": "dW"}


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *map(list, rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def kernels_case(case: dict) -> str:
    """All of one case, a provider a line; those that failed with their errors."""
    columns = ("", "time", "to eager", "extra memory", "to eager", "of roof", "errors", "work")
    rows = [[title(provider), *case_columns(found)] for provider, found in measured(case).items()]
    rows += [[title(provider), f"failed: {error}", *[""] * 6] for provider, error in failed(case).items()]
    words = name(case)
    return f"**{words[0].upper()}{words[1:]}**, mean entropy {case['mean_entropy']:.2f} nats:\n\n{table(columns, rows)}"


def case_columns(found: dict) -> list[str]:
    errors = ", ".join(f"{SYMBOLS[what]} {error:.0e}" for what, error in found.get("errors", {}).items())
    return [
        seconds(found["seconds"]),
        number(found, "time_ratio"),
        mib(found["peak_extra_mib"]) if "peak_extra_mib" in found else "",
        number(found, "memory_ratio"),
        number(found, "share_of_roof", ".0%"),
        errors,
        found["work"],
    ]


def kernels_overview(cases: list[dict]) -> str:
    """Time and memory to eager's, a case a column."""
    providers = list(dict.fromkeys(provider for case in cases for provider in case["providers"]))
    rows = [[title(provider), *(overview_cell(case, provider) for case in cases)] for provider in providers]
    return "Time and memory to eager's:\n\n" + table(["", *(name(case) for case in cases)], rows)


def overview_cell(case: dict, provider: str) -> str:
    found = case["providers"].get(provider)
    if found is None:
        return ""
    if "error" in found:
        return "failed"
    ratios = [number(found, what) for what in ("time_ratio", "memory_ratio") if what in found]
    return ", ".join(ratios) or seconds(found["seconds"])


def provenance(report: dict) -> str:
    """Command, date, machine, versions, settings, roofs."""
    settings = ", ".join(f"{setting} {value}" for setting, value in report["settings"].items() if value is not None)
    return f"`{report['command']}`, {report['date']}, on {facts(report['machine'])}; {settings}{roofs(report)}.\n"


def roofs(report: dict) -> str:
    found = report.get("roofs")
    if not found:
        return ""
    products = ", ".join(f"{dtype} {rate:.3g}" for dtype, rate in found["matmul_tflops"].items())
    return f". Roofs of the same run: a large product {products} TFLOP/s, a copy {found['copy_gb_per_s']:.3g} GB/s"


def caveats(cases: list[dict]) -> str:
    """What a reader of these cases would get wrong; "" where there is nothing."""
    lines = []
    if narrow := sorted({case["d"] for case in cases if case["d"] < NARROW}):
        lines.append(
            f"- D {', '.join(map(str, narrow))} is far narrower than a model's head: passes over the logits weigh more "
            "beside products, and few rows at a time make these slower. At a model's head times are closer to eager's.\n"
        )
    if any(found.get("share_of_roof", 0) > 1 for case in cases for found in measured(case).values()):
        lines.append(
            "- A share of roof above 100 %: caches served what is counted as traffic to memory, or the machine was slower "
            "when its roofs were measured.\n"
        )
    if why := spoilt(cases):
        lines.append(f"- {why}.\n")
    return "".join(lines)


def step(report: dict) -> str:
    """`bench.step`: a head a line."""
    columns = ["", "update", "to eager", "tokens/s", "MFU", "peak memory", "extra", "to eager", "work"]
    longest = any("longest" in case for case in report["cases"])
    rows = []
    for case in report["cases"]:
        most = [f"{case['longest']['tokens']:,}" if "longest" in case else ""] if longest else []
        rows.append([title(case["head"]), *step_columns(case), case["work"], *most])
    return step_title(report) + "\n\n" + table([*columns, *(["longest that fits"] if longest else [])], rows)


def step_title(report: dict) -> str:
    settings = report["settings"]
    words = f"**An update of {settings['size']}**, {settings['dtype']}"
    case = next((case for case in report["cases"] if "seconds" in case), None)
    if case is None:
        return words + ":"
    model = f"{case['parameters'] / 1e6:,.0f} M parameters, {case['layers']} layers, vocabulary {case['vocabulary']:,}"
    return f"{words}: {model}; {settings['tokens']:,} packed tokens, {case['response_tokens']:,} of responses:"


def step_columns(case: dict) -> list[str]:
    if "seconds" not in case:
        why = f"skipped: {case['skipped']}" if "skipped" in case else f"failed: {case['error']}"
        return [why, *[""] * 6]
    low, high = case["seconds_spread"]
    return [
        f"{seconds(case['seconds'])} ({seconds(low)} to {seconds(high)})",
        number(case, "time_ratio"),
        f"{case['tokens_per_second']:,.0f}",
        f"{case['mfu']:.1%}",
        f"{case['peak_gib']:.2f} GiB",
        f"{case['extra_gib']:.2f} GiB",
        number(case, "extra_ratio"),
    ]


def scaling(report: dict) -> str:
    """`bench.scaling`: exponents, a provider a line."""
    axes = list(dict.fromkeys(case["axis"] for case in report["cases"]))
    kinds = [(axis, what) for axis in axes for what in ("seconds", "peak_extra_mib")]
    names = {"seconds": "time", "peak_extra_mib": "memory"}
    rows = [
        [title(provider), *(number(slopes.get(axis, {}), what) for axis, what in kinds)]
        for provider, slopes in report["slopes"].items()
    ]
    by = {axis: axis.upper() if len(axis) == 1 else axis for axis in axes}
    return table(["exponent of", *(f"{names[what]} by {by[axis]}" for axis, what in kinds)], rows)


def number(found: dict, what: str, form: str = ".2f") -> str:
    return format(found[what], form) if found.get(what) is not None else ""


def title(provider: str) -> str:
    return f"**{provider}**" if is_ours(provider) else provider
