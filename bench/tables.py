"""Markdown of reports, for the terminal and for the READMEs: tables, where we lose, and what they were measured on."""

import math
import statistics
from collections.abc import Callable

from mssr.errors import UserError

from .jobs import POLICY
from .report import (
    EAGER,
    TASKS,
    bullets,
    facts,
    is_ours,
    measured,
    mib,
    missing,
    name,
    number,
    seconds,
    spoilt,
    table,
    title,
    why,
)

NARROW = 1024  # narrower than any model's head that is measured here
SYMBOLS = {"logp": "logp", "entropy": "H", "d_hidden": "dH", "d_weight": "dW"}
SPECIFICATION = "mssr reference"  # is written to be read, not to be fast
SAME = 1.02  # a smaller factor in time or memory is no loss
LESS_EXACT = 2.0
AXES = ("n", "v", "d")  # of bench.scaling
MEASURES = {"seconds": "time", "peak_extra_mib": "memory"}


def provenance(report: dict) -> str:
    """Command, date, machine, versions, settings and roofs.

    Raises:
        UserError: the report does not tell them.
    """
    if unknown := [what for what in ("command", "date") if what not in report]:
        raise UserError(f"report lacks `{unknown[0]}` (older version): run the benchmark again")
    settings = ", ".join(f"{setting} {value}" for setting, value in report["settings"].items() if value is not None)
    return f"`{report['command']}`, {report['date']}, on {facts(report)}; {settings}{roofs(report)}.\n"


def roofs(report: dict) -> str:
    found = report.get("roofs")
    if not found:
        return ""
    products = ", ".join(f"{dtype} {rate:.3g}" for dtype, rate in found["matmul_tflops"].items())
    return f". Roofs of the same run: a large product {products} TFLOP/s, a copy {found['copy_gb_per_s']:.3g} GB/s"


# bench.kernels.


def kernels(report: dict) -> str:
    """Every case, where we lose, and what was not run."""
    cases = report["cases"]
    parts = [provenance(report), *map(kernels_case, cases), *([where_we_lose(cases)] if cases else [])]
    return "\n".join([*parts, caveats(cases), bullets(f"not run: {line}" for line in report.get("not_run", []))])


def kernels_case(case: dict) -> str:
    """One case with a provider per line; those without figures say why."""
    columns = ("", "time", "vs eager", "extra memory", "vs eager", "of roof", "errors", "work")
    rows = [[title(provider), *case_columns(found)] for provider, found in measured(case).items()]
    rows += [[title(provider), reason] for provider, reason in missing(case).items()]
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
    """A line for each of ours: who is faster or smaller, and in how many of the cases that both ran."""
    ours = dict.fromkeys(provider for case in cases for provider in measured(case) if is_ours(provider))
    intro = f"Where we lose, by more than {SAME - 1:.0%} of time or memory, or {LESS_EXACT:g} times eager's error:"
    lines = (f"**{provider}** {summed_up(provider, cases)}." for provider in ours if provider != SPECIFICATION)
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
    work = objective(both[0][other])
    other = other if work == objective(both[0][provider]) else f"{other} ({work})"
    return f"{other} in {len(lost)} of {len(factors)} cases, by up to {max(lost):.3g}x"


def objective(found: dict) -> str:
    return found.get("work", POLICY).split(";")[0]


def slower(ours: dict, other: dict) -> float | None:
    """Compare turn by turn, where turns are known."""
    if "seconds_all" not in ours:
        return ours["seconds"] / other["seconds"]
    return statistics.median(a / b for a, b in zip(ours["seconds_all"], other["seconds_all"]))


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
    """A head per line."""
    columns = ["", "update", "vs eager", "tokens/s", "MFU", "peak memory", "extra", "vs eager", "work"]
    rows = [[title(case["head"]), *step_columns(case)] for case in report["cases"]]
    differ = [f"**{case['head']} differs from eager by {case['differs']:.0e}.**" for case in report["cases"]
              if not case.get("agrees", True)]  # fmt: skip
    providers = {case["head"]: case | {"peak_extra_mib": 1024 * case.get("extra_gib", 0)} for case in report["cases"]}
    as_case = {"providers": providers}
    roof = report["roof"]
    known = f"MFU is of {roof['tflops']:.3g} TFLOP/s ({roof['source']}).\n"
    lost = where_we_lose([as_case])
    parts = [step_title(report), table(columns, rows), bullets(differ), lost, known, provenance(report)]
    return "\n".join(part for part in parts if part)


def step_title(report: dict) -> str:
    settings = report["settings"]
    words = f"**An update of {settings['size']}**, {settings['dtype']}"
    case = next((case for case in report["cases"] if "seconds" in case), None)
    if case is None:
        return words + ":\n"
    model = f"{case['parameters'] / 1e6:,.0f} M parameters, {case['layers']} layers, vocabulary {case['vocabulary']:,}"
    return f"{words}: {model}; {settings['tokens']:,} packed tokens, {case['response_tokens']:,} of responses:\n"


def step_columns(case: dict) -> list[str]:
    if "seconds" not in case:
        return [why(case), *[""] * 6, case["work"]]
    low, high = case["seconds_spread"]
    return [
        f"{seconds(case['seconds'])} ({seconds(low)} to {seconds(high)})",
        number(case, "time_ratio"),
        f"{case['tokens_per_second']:,.0f}",
        f"{case['mfu']:.1%}",
        f"{case['peak_gib']:.2f} GiB",
        f"{case['extra_gib']:.2f} GiB",
        number(case, "extra_ratio"),
        case["work"],
    ]


def sync(report: dict) -> str:
    """A model and ZeRO stage per line."""
    columns = ("size", "parameters", "mode, ranks", "sync", "GB/s", "extra memory", "of it gathered")
    rows = [[case["size"], *sync_columns(case)] for case in report["cases"]]
    return f"**Weight sync**, median (lowest to highest):\n\n{table(columns, rows)}\n{provenance(report)}"


def sync_columns(case: dict) -> list[str]:
    mode = f"{case['mode']}, {case['ranks']}"
    if "seconds" not in case:
        return ["", mode, why(case)]
    low, high = case["seconds_spread"]
    return [
        f"{case['parameters']:,}",
        mode,
        f"{seconds(case['seconds'])} ({seconds(low)} to {seconds(high)})",
        f"{case['bytes_per_second'] / 1e9:.2f}",
        mib(case["peak_extra_mib"]),
        mib(case["peak_extra_mib_of_gathering"]),
    ]


def scaling(report: dict) -> str:
    """Exponents of `bench.scaling`, a provider and task per line."""
    found = exponents(report)
    kinds = [(axis, what) for axis in AXES for what in MEASURES]
    rows = [
        [title(provider), TASKS[task], *(f"{fitted[kind]:.2f}" if kind in fitted else "" for kind in kinds)]
        for (provider, task), fitted in found.items()
    ]
    header = ["exponent of", "", *(f"{MEASURES[what]} by {axis.upper()}" for axis, what in kinds)]
    return f"{table(header, rows)}\n{provenance(report)}"


def exponents(report: dict) -> dict[tuple[str, str], dict[tuple[str, str], float]]:
    """Return (provider, task) -> (axis, measure) -> exponent. What was not measured at two sizes has none."""
    points: dict = {}
    for axis in AXES:
        fixed = [other for other in AXES if other != axis]
        for case in report["cases"]:
            on_axis = all(case[other] == report["settings"][other] for other in fixed)
            for provider, found in measured(case).items() if on_axis else ():
                for what in (what for what in MEASURES if found.get(what, 0) > 0):
                    of_job = points.setdefault((provider, case["task"]), {})
                    of_job.setdefault((axis, what), []).append((case[axis], found[what]))
    return {
        job: {kind: exponent(values) for kind, values in kinds.items() if len(values) > 1}
        for job, kinds in points.items()
    }


def exponent(points: list[tuple[float, float]]) -> float:
    """Return the slope of the least-squares line through (log size, log value)."""
    return statistics.linear_regression(*([math.log(value) for value in values] for values in zip(*points))).slope
