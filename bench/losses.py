"""Where ours lose, as sentences made from the figures alone: case by case, and summed up over the cases."""

import math
import statistics
from collections.abc import Callable

from .jobs import POLICY
from .reports import EAGER, is_ours, measured

SPECIFICATION = "mssr reference"  # is there to be read, not to be fast
FIGURES = (("seconds", "faster", 1e3, "ms"), ("peak_extra_mib", "smaller", 1, "MiB"))
SAME = 1.02  # closer times or sizes are no loss in the sum
LESS_EXACT = 2.0


def sentences(report: dict, name_of: Callable[[dict], str]) -> list[str]:
    """One for each case and provider that is faster or smaller than one of ours; in each case those that do the same work
    come first. name_of: what a case is called. [] where there is none in what was measured."""
    return [
        f"{name_of(case)}: {name}{said} is {' and '.join(lost)}."
        for case in report["cases"]
        for name, said, lost in sorted(_losses(case), key=lambda loss: loss[1] != "")
    ]


def _losses(case: dict) -> list[tuple[str, str, list[str]]]:
    ours = {name: found for name, found in measured(case).items() if is_ours(name) and name != SPECIFICATION}
    found = []
    for name, result in measured(case).items():
        work = objective(result)
        said = "" if work == POLICY else f" (less work: {work})"
        lost = [words for figure in FIGURES if (words := _behind(result, ours, *figure))]
        if not is_ours(name) and lost:
            found.append((name, said, lost))
    return found


def objective(result: dict) -> str:
    return result["work"].split(";")[0]


def _behind(theirs: dict, ours: dict[str, dict], key: str, word: str, scale: float, unit: str) -> str:
    """ "" where none of ours is."""
    if key not in theirs:
        return ""
    behind = {name: result[key] * scale for name, result in ours.items() if result.get(key, 0) > theirs[key]}
    those = ", ".join(f"{name} ({_digits(value)})" for name, value in behind.items())
    return f"{word} ({_digits(theirs[key] * scale)} {unit}) than {those}" if behind else ""


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def where_we_lose(cases: list[dict]) -> str:
    """Markdown, a line for each of ours: who is faster or smaller, in how many of the cases that both ran."""
    names = dict.fromkeys(provider for case in cases for provider in measured(case) if is_ours(provider))
    lines = [f"- **{ours}** {summed_up(ours, cases)}." for ours in names if ours != SPECIFICATION]
    intro = f"Where we lose, by more than {SAME - 1:.0%} of time or memory, or {LESS_EXACT:g} times eager's error:"
    return "\n".join([intro, "", *lines]) + "\n"


def summed_up(provider: str, cases: list[dict]) -> str:
    """Of errors eager's alone: those of peers are in the tables."""
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


def slower(ours: dict, other: dict) -> float | None:
    """Within the turns, where these are known."""
    if "seconds_all" not in ours:
        return ours["seconds"] / other["seconds"]
    return statistics.median(a / b for a, b in zip(ours["seconds_all"], other["seconds_all"]))


def larger(ours: dict, other: dict) -> float | None:
    a, b = ours.get("peak_extra_mib"), other.get("peak_extra_mib")
    return a / b if a is not None and b else None


def less_exact(ours: dict, other: dict) -> float | None:
    """Of the worst of the errors that both have; what is not finite is worse than any."""
    a, b = ours.get("errors", {}), other.get("errors", {})
    factors = [a[what] / b[what] if math.isfinite(a[what]) else math.inf for what in a if b.get(what)]
    return max(factors, default=None)
