"""What changed from one benchmark of the kernels to another.

    python -m bench.compare A B      # folders with a kernels.json, or such files; A is the older one

Time: the change of a provider's time relative to eager, B's over A's, so that the machine's speed cancels; `raw` is the
change of its seconds. A case in which eager did not run is compared by seconds alone, and a note says so.
A change is flagged if the medians differ by more than 10 % and a one-sided rank test of the turns (Mann and Whitney) has
p < 0.01. The test uses ranks, so that a turn in which the machine was busy counts as one turn only. The test covers noise
within a run; the 10 % threshold covers shifts between runs.
Memory is flagged if it grew by more than 10 % and 16 MiB, an error if it more than doubled and is above rounding.
Only ours are flagged; peers are shown. Exit code: 0; 1 if one of ours is flagged; 2 for a mistake.
"""

import math
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from scipy import stats

from mssr.cli import run_command
from mssr.errors import UserError

from . import arguments as options
from . import report
from .markdown import bullets, number, table
from .report import EAGER, is_ours, load, measured, name, spoilt, why

SLOWER = 1.10
SIGNIFICANT = 0.01
LARGER, LARGER_MIB = 1.10, 16.0
WORSE = 2.0
# An error above these is more than rounding: nats of statistics, which are float32; gradients by the head's dtype.
STATISTICS = ("error of logp", "error of entropy")
STATISTICS_ROUNDING = 2e-5
GRADIENT_ROUNDING = {"float32": 1e-5, "float16": 2.0**-11, "bfloat16": 2.0**-8}


class Comparison(NamedTuple):
    """cases: (name, rows of its table) of the cases in both reports. notes: what else a reader must know, one line each.
    flagged: what got worse of ours."""

    cases: list[tuple[str, list[list[str]]]]
    notes: list[str]
    flagged: list[str]


def main(words: list[str] | None = None) -> int:
    parser = options.parser(__doc__)
    parser.add_argument("before", type=Path, metavar="A", help="folder, or kernels.json")
    parser.add_argument("after", type=Path, metavar="B", help="the newer one")
    arguments = parser.parse_args(words)
    found = compare(load(arguments.before), load(arguments.after))
    report.show(text(found))
    return int(bool(found.flagged))


def compare(before: dict, after: dict) -> Comparison:
    """Compare two reports of `bench.kernels`, the older one first.

    Raises:
        UserError: they have no case in common.
    """
    old, new = ({name(case): case for case in each["cases"]} for each in (before, after))
    found = Comparison([], [], [])
    for what in ("machine", "settings"):
        facts = before[what] | after[what]
        changes = [f"{fact} {before[what].get(fact, 'none')} -> {after[what].get(fact, 'none')}" for fact in facts
                   if before[what].get(fact) != after[what].get(fact)]  # fmt: skip
        found.notes.extend([f"different {what}: {', '.join(changes)}"] if changes else [])
    for label, here, there in (("A", old, new), ("B", new, old)):
        found.notes.extend(f"only in {label}: {case}" for case in here if case not in there)
        found.notes.extend([f"{label}: {words}"] if (words := spoilt(list(here.values()))) else [])
    for case in (case for case in old if case in new):
        compare_case(old[case], new[case], found)
    if not found.cases:
        raise UserError("the two reports have no case in common (model, N, D, V, dtype, rows, task)")
    return found


def compare_case(before: dict, after: dict, found: Comparison) -> None:
    """Add one case to what was found."""
    title, a, b = name(after), measured(before), measured(after)
    raw_only = not (EAGER in a and EAGER in b)
    notes = ["without eager in both, seconds are compared, which depend on the machine's speed"] if raw_only else []
    rows, flags = [], []
    for provider in (provider for provider in a if provider in b):
        cells, flagged = change(provider, a, b, after["dtype"], raw_only)
        rows.append(cells)
        flags += [f"{provider}: {flag}" for flag in flagged]
        gone = figures(a[provider]).keys() - figures(b[provider]).keys()
        notes += [f"{provider}: {', '.join(sorted(gone))} measured only in A"] if gone else []
    for provider in before["providers"] | after["providers"]:
        states = [state(provider, case) for case in (before, after)]
        if states[0] != states[1]:
            worse = is_ours(provider) and provider in a and provider in after["providers"]
            (flags if worse else notes).append(f"{provider}: {' -> '.join(states)}")
    turns = [len(next(iter(each.values()))["seconds_all"]) for each in (a, b) if each]
    if len(turns) == 2 and 1 / math.comb(sum(turns), turns[0]) >= SIGNIFICANT:
        notes.append(
            f"{turns[0]} and {turns[1]} turns are too few to tell a slowdown from noise; use --repeats 5 or more"
        )
    found.cases.append((title, rows))
    found.notes.extend(f"{title}: {line}" for line in notes)
    found.flagged.extend(f"{title}: {line}" for line in flags)


def state(provider: str, case: dict) -> str:
    found = case["providers"].get(provider)
    return "not in the report" if found is None else "measured" if "seconds" in found else why(found)


def change(provider: str, before: dict, after: dict, dtype: str, raw_only: bool) -> tuple[list[str], list[str]]:
    """Return the provider's row of the table, and what got worse; the latter is empty for peers."""
    a, b = before[provider], after[provider]
    turns = [a["seconds_all"], b["seconds_all"]]
    if not raw_only:
        turns = [report.ratios(a, before[EAGER]), report.ratios(b, after[EAGER])]
    ratio = statistics.median(turns[1]) / statistics.median(turns[0])
    p = float(stats.mannwhitneyu(turns[1], turns[0], alternative="greater" if ratio > 1 else "less").pvalue)
    verdict = "slower" if ratio > SLOWER else "faster" if ratio < 1 / SLOWER else ""
    verdict = verdict if p < SIGNIFICANT else ""
    flags = []
    if is_ours(provider):
        slower = [f"{ratio - 1:.0%} slower{'' if raw_only else ' relative to eager'} (p {p:.0e})"]
        flags = slower * (verdict == "slower") + worse(a, b, dtype)
    vs_eager = ["", "", ""]
    if not raw_only:
        vs_eager = [number(a, "time_ratio", ".3f"), number(b, "time_ratio", ".3f"), f"{ratio - 1:+.1%}"]
    memory = [number(found, "peak_extra_mib", ",.0f") for found in (a, b)]
    raw = b["seconds"] / a["seconds"]
    return [provider, *vs_eager, f"{raw - 1:+.1%}", *memory, "; ".join(flags) or verdict], flags


def worse(before: dict, after: dict, dtype: str) -> list[str]:
    """Return the memory and the errors that got worse; NaN is worse than any number."""
    found, a, b = [], figures(before), figures(after)
    for what in (what for what in a if what in b):
        rounding = STATISTICS_ROUNDING if what in STATISTICS else GRADIENT_ROUNDING[dtype]
        limit = max(LARGER * a[what], a[what] + LARGER_MIB) if what == "MiB" else max(WORSE * a[what], rounding)
        if not b[what] <= limit and not math.isnan(a[what]):
            form = ",.0f" if what == "MiB" else ".1e"
            found.append(f"{what} {a[what]:{form}} -> {b[what]:{form}}")
    return found


def figures(found: dict) -> dict[str, float]:
    """Return memory in MiB and errors, by name."""
    memory = {"MiB": found["peak_extra_mib"]} if "peak_extra_mib" in found else {}
    return memory | {f"error of {what}": error for what, error in found.get("errors", {}).items()}


def text(found: Comparison) -> str:
    columns = ("", "vs eager, A", "B", "change", "raw", "MiB, A", "B", "")
    parts = [f"**{title}**\n\n{table(columns, rows)}" for title, rows in found.cases]
    flagged = [f"REGRESSION {line}" for line in found.flagged] or ["no regression of ours"]
    return "\n".join([*parts, bullets([*found.notes, *flagged])])


if __name__ == "__main__":
    run_command(lambda: sys.exit(main()))
