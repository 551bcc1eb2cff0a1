"""Markdown of reports, for the terminal and for the READMEs: tables, where we lose, and what they were measured on."""

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Callable

from .markdown import bullets, mib, number, seconds, table, title
from .report import EAGER, TASKS, facts, is_ours, measured, name, ratios, spoilt, why

NARROW = 1024  # narrower than any model's head that is measured here
SYMBOLS = {"logp": "logp", "entropy": "H", "d_hidden": "dH", "d_weight": "dW"}
SAME = 1.02  # a smaller factor in time or memory is no loss
LESS_EXACT = 2.0
AXES = ("n", "v", "d")  # of bench.scaling
MEASURES = {"seconds": "time", "peak_extra_mib": "memory"}


def provenance(report: dict) -> str:
    """Command, date, machine, versions, settings and roofs."""
    settings = ", ".join(f"{setting} {value}" for setting, value in report["settings"].items() if value is not None)
    words = f"`{report['command']}`, {report['date']}, on {facts(report)}; {settings}"
    if found := report.get("roofs"):
        products = ", ".join(f"{dtype} {rate:.3g}" for dtype, rate in found["matmul_tflops"].items())
        words += (
            f". Roofs of the same run: a large product {products} TFLOP/s, a copy {found['copy_gb_per_s']:.3g} GB/s"
        )
    return f"{words}.\n"


def figures(columns: list[str], found: dict[str, dict], cells: Callable[[dict], list[str]]) -> str:
    """A table with a line per provider, head or model; those without figures come last and say why."""
    ordered = sorted(found.items(), key=lambda item: "seconds" not in item[1])
    return table(columns, [[title(each), *(cells(of) if "seconds" in of else [why(of)])] for each, of in ordered])


# bench.kernels.


def kernels(report: dict) -> str:
    """Every case, where we lose, and what was not run."""
    cases = report["cases"]
    parts = [provenance(report), *map(kernels_case, cases), *([where_we_lose(cases)] if cases else [])]
    return "\n".join([*parts, caveats(cases), bullets(f"not run: {line}" for line in report.get("not_run", []))])


def kernels_case(case: dict) -> str:
    columns = ["", "time", "vs eager", "extra memory", "vs eager", "of roof", "errors", "work"]
    words = name(case)
    heading = f"**{words[0].upper()}{words[1:]}**, mean entropy {case['mean_entropy']:.2f} nats:"
    eager = case["providers"].get(EAGER, {})
    return f"{heading}\n\n{figures(columns, case['providers'], lambda found: case_cells(found, eager))}"


def case_cells(found: dict, eager: dict) -> list[str]:
    memory_ratio = larger(found, eager)
    errors = ", ".join(f"{SYMBOLS[what]} {error:.0e}" for what, error in found.get("errors", {}).items())
    return [
        seconds(found["seconds"]),
        number(found, "time_ratio"),
        mib(found["peak_extra_mib"]) if "peak_extra_mib" in found else "",
        "" if memory_ratio is None else f"{memory_ratio:.2f}",
        number(found, "share_of_roof", ".0%"),
        errors,
        found["work"],
    ]


def caveats(cases: list[dict]) -> str:
    """Return notes on how to read these cases, or an empty string."""
    lines = []
    if narrow := sorted({case["d"] for case in cases if case["d"] < NARROW}):
        lines.append(
            f"D {', '.join(map(str, narrow))} is far narrower than a model's head: passes over the logits weigh more "
            "against products, and few rows at a time make these slower. At a model's head times are closer to eager's."
        )
    if any(found.get("share_of_roof", 0) > 1 for case in cases for found in measured(case).values()):
        lines.append(
            "A share of roof above 100 %: caches served what is counted as memory traffic, or the machine was slower "
            "when its roofs were measured."
        )
    if words := spoilt(cases):
        lines.append(f"{words}.")
    return bullets(lines)


# Where we lose.


def where_we_lose(cases: list[dict]) -> str:
    """A line per mode of ours: who is faster or smaller, and in how many of the cases that both ran."""
    ours = dict.fromkeys(provider for case in cases for provider in measured(case) if is_ours(provider))
    intro = f"Where we lose, by more than {SAME - 1:.0%} of time or memory, or {LESS_EXACT:g} times eager's error:"
    lines = (f"**{provider}** {summed_up(provider, cases)}." for provider in ours)
    return f"{intro}\n\n{bullets(lines)}"


def summed_up(provider: str, cases: list[dict]) -> str:
    """Errors are compared with eager's only: those of peers are in the tables."""
    others = list(dict.fromkeys(other for case in cases for other in measured(case) if not is_ours(other)))
    kinds = (
        ("is slower than", others, slower, SAME),
        ("takes more memory than", others, larger, SAME),
        ("errs more than", [EAGER], less_exact, LESS_EXACT),
    )
    found = []
    for verb, to, factor_of, least in kinds:
        lost = [words for other in to if (words := lost_to(provider, other, cases, factor_of, least))]
        if lost:
            found.append(f"{verb} {', '.join(lost)}")
    return "; ".join(found) or "loses to none of the others"


def lost_to(provider: str, other: str, cases: list[dict], factor_of: Callable, least: float) -> str:
    both = [measured(case) for case in cases if provider in measured(case) and other in measured(case)]
    factors = [factor for found in both if (factor := factor_of(found[provider], found[other])) is not None]
    lost = [factor for factor in factors if factor > least]
    if not lost:
        return ""
    work, our_work = (both[0][each]["work"].split(";")[0] for each in (other, provider))
    other = other if work == our_work else f"{other} ({work})"
    return f"{other} in {len(lost)} of {len(factors)} cases, by up to {max(lost):.3g}x"


def slower(ours: dict, other: dict) -> float:
    return statistics.median(ratios(ours, other))


def larger(ours: dict, other: dict) -> float | None:
    a, b = ours.get("peak_extra_mib"), other.get("peak_extra_mib")
    return a / b if a is not None and b else None


def less_exact(ours: dict, other: dict) -> float | None:
    """Compare the errors that both have and return the worst factor; NaN and infinity are worse than any number."""
    a, b = ours.get("errors", {}), other.get("errors", {})
    factors = [a[what] / b[what] if math.isfinite(a[what]) else math.inf for what in a if b.get(what)]
    return max(factors, default=None)


# bench.step, bench.sync, bench.scaling.


def step(report: dict) -> str:
    columns = ["", "update", "vs eager", "tokens/s", "MFU", "peak memory", "extra", "vs eager", "work"]
    heads = {case["head"]: case for case in report["cases"]}
    differ = [f"**{head} differs from eager by {case['differs']:.0e}.**" for head, case in heads.items()
              if not case.get("agrees", True)]  # fmt: skip
    as_kernels = {
        head: case | {"peak_extra_mib": 1024 * case["extra_gib"], "seconds_all": [case["seconds"]]}
        for head, case in heads.items()
        if "seconds" in case
    }
    lost = where_we_lose([{"providers": as_kernels}])
    roof = report["roof"]
    known = f"MFU is of {roof['tflops']:.3g} TFLOP/s ({roof['source']}).\n"
    parts = [step_title(report), figures(columns, heads, step_cells), bullets(differ), lost, known, provenance(report)]
    return "\n".join(part for part in parts if part)


def step_title(report: dict) -> str:
    settings = report["settings"]
    words = f"**An update of {settings['size']}**, {settings['dtype']}"
    case = next((case for case in report["cases"] if "seconds" in case), None)
    if case is None:
        return words + ":\n"
    model = f"{case['parameters'] / 1e6:,.0f} M parameters, {case['layers']} layers, vocabulary {case['vocabulary']:,}"
    return f"{words}: {model}; {settings['tokens']:,} packed tokens, {case['response_tokens']:,} of responses:\n"


def step_cells(case: dict) -> list[str]:
    return [
        spread(case),
        number(case, "time_ratio"),
        f"{case['tokens_per_second']:,.0f}",
        f"{case['mfu']:.1%}",
        f"{case['peak_gib']:.2f} GiB",
        f"{case['extra_gib']:.2f} GiB",
        number(case, "extra_ratio"),
        case["work"],
    ]


def spread(case: dict) -> str:
    low, high = case["seconds_spread"]
    return f"{seconds(case['seconds'])} ({seconds(low)} to {seconds(high)})"


def sync(report: dict) -> str:
    columns = ["model, mode, ranks", "parameters", "sync", "GB/s", "extra memory"]
    found = {f"{case['size']}, {case['mode']}, {case['ranks']}": case for case in report["cases"]}
    rows = figures(columns, found, sync_cells)
    return f"**Weight sync**, median (lowest to highest):\n\n{rows}\n{provenance(report)}"


def sync_cells(case: dict) -> list[str]:
    return [
        f"{case['parameters']:,}",
        spread(case),
        f"{case['bytes_per_second'] / 1e9:.2f}",
        mib(case["peak_extra_mib"]),
    ]


def scaling(report: dict) -> str:
    """Exponents, one line per provider and task."""
    kinds = list(itertools.product(AXES, MEASURES))
    rows = [
        [title(provider), TASKS[task], *(f"{fitted[kind]:.2f}" if kind in fitted else "" for kind in kinds)]
        for (provider, task), fitted in exponents(report).items()
    ]
    header = ["exponent of", "", *(f"{MEASURES[what]} by {axis.upper()}" for axis, what in kinds)]
    return f"{table(header, rows)}\n{provenance(report)}"


def exponents(report: dict) -> dict[tuple[str, str], dict[tuple[str, str], float]]:
    """Return (provider, task) -> (axis, measure) -> exponent, for what was measured at two sizes or more."""
    points: dict = defaultdict(lambda: defaultdict(list))
    for axis, case in itertools.product(AXES, report["cases"]):
        if all(case[other] == report["settings"][other] for other in AXES if other != axis):
            for (provider, found), what in itertools.product(measured(case).items(), MEASURES):
                if found.get(what, 0) > 0:
                    points[provider, case["task"]][axis, what].append((case[axis], found[what]))
    return {
        job: {kind: exponent(values) for kind, values in kinds.items() if len(values) > 1}
        for job, kinds in points.items()
    }


def exponent(points: list[tuple[float, float]]) -> float:
    """Return the slope of the least-squares line through (log size, log value)."""
    return statistics.linear_regression(*([math.log(value) for value in values] for values in zip(*points))).slope
