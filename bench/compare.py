"""What changed from one benchmark of the kernels to another.

    python -m bench.compare A B      # folders with a kernels.json, or such files; A is the older one

Time: the change of a provider's time relative to eager, B's over A's, so that the machine's speed cancels; `raw` is the
change of its seconds. A case in which eager did not run is compared by seconds alone, and says so.
A change is flagged if the medians differ by more than 10 % and a one-sided rank test of the turns (Mann and Whitney) has
p < 0.01. The test uses ranks, so that a turn in which the machine was busy counts as one turn only. The test covers noise
within a run; the 10 % threshold covers shifts between runs.
Memory is flagged if it grew by more than 10 % and 16 MiB, an error if it more than doubled and is above rounding.
Only ours are flagged; peers are shown. Exit code: 0; 1 if one of ours is flagged; 2 for a mistake.
"""

import argparse
import math
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from scipy import stats

from mssr.errors import UserError

from . import report
from .report import EAGER, is_ours, key, load_kernels, measured, missing, name, spoilt

SLOWER = 1.10
SIGNIFICANT = 0.01
LARGER, LARGER_MIB = 1.10, 16.0
WORSE = 2.0
# An error above these is more than rounding: nats of statistics, which are float32; gradients by the head's dtype.
STATISTICS = ("logp", "entropy")
STATISTICS_ROUNDING = 2e-5
GRADIENT_ROUNDING = {"float32": 1e-5, "float16": 2.0**-11, "bfloat16": 2.0**-8}


class Change(NamedTuple):
    """One provider in one case. flags: what got worse, in words; empty for peers."""

    provider: str
    before: dict
    after: dict
    ratio: float  # of the times relative to eager; of seconds if `raw_only`
    raw: float
    raw_only: bool
    p_slower: float
    p_faster: float
    flags: tuple[str, ...]

    @property
    def verdict(self) -> str:
        if self.flags:
            return "; ".join(self.flags)
        if self.ratio > SLOWER and self.p_slower < SIGNIFICANT:
            return "slower"
        return "faster" if self.ratio < 1 / SLOWER and self.p_faster < SIGNIFICANT else ""


class Comparison(NamedTuple):
    """cases: (name, changes) of what both reports have. notes: what a reader must know, a line each."""

    cases: list[tuple[str, list[Change]]]
    notes: list[str]
    flagged: list[str]


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("before", type=Path, metavar="A", help="folder, or kernels.json")
    parser.add_argument("after", type=Path, metavar="B")
    arguments = parser.parse_args(words)
    try:
        found = compare(load_kernels(arguments.before), load_kernels(arguments.after))
    except UserError as error:
        print(f"bench.compare: {error}", file=sys.stderr)
        return 2
    report.show(text(found))
    return int(bool(found.flagged))


def compare(before: dict, after: dict) -> Comparison:
    """Compare two reports of `bench.kernels`, the older one first.

    Raises:
        UserError: they have no case in common.
    """
    old, new = ({key(case): case for case in each["cases"]} for each in (before, after))
    common = [case for case in old if case in new]
    if not common:
        raise UserError("the two reports have no case in common (model, N, D, V, dtype, rows, task, softcap)")
    notes = differences("machines or versions differ, which also changes ratios", before["machine"], after["machine"])
    notes += differences("settings differ", before["settings"], after["settings"])
    for label, cases in (("A", before["cases"]), ("B", after["cases"])):
        notes += [f"{label}: {why}"] if (why := spoilt(cases)) else []
    flagged, cases = [], []
    for here, there, label in ((old, new, "A"), (new, old, "B")):
        notes += [f"only in {label}: {name(here[case])}" for case in here if case not in there]
    for case in common:
        title, a, b = name(new[case]), old[case], new[case]
        changes = compare_case(a, b)
        cases.append((title, changes))
        notes += [f"{title}: {line}" for line in notes_on_case(a, b)]
        flagged += [f"{title}: {change.provider}: {flag}" for change in changes for flag in change.flags]
        flagged += [f"{title}: {line}" for line in newly_failed(a, b)]
    return Comparison(cases, notes, flagged)


def differences(what: str, before: dict, after: dict) -> list[str]:
    """Return one line, or none."""
    facts = [*before, *(fact for fact in after if fact not in before)]
    changed = [
        f"{fact} {before.get(fact, 'none')} -> {after.get(fact, 'none')}"
        for fact in facts
        if before.get(fact) != after.get(fact)
    ]
    return [f"{what}: {', '.join(changed)}"] if changed else []


def notes_on_case(before: dict, after: dict) -> list[str]:
    a, b, lines = measured(before), measured(after), []
    gone, returned = missing(after), missing(before)
    for here, there, label in ((before, after, "A"), (after, before, "B")):
        alone = [provider for provider in here["providers"] if provider not in there["providers"]]
        lines += [f"only in {label}: {', '.join(alone)}"] if alone else []
    for provider in before["providers"].keys() & after["providers"].keys():
        if provider in a and provider not in b and not is_ours(provider):
            lines.append(f"{provider} does not run now: {gone[provider]}")
        elif provider in b and provider not in a:
            lines.append(f"{provider} runs now; before: {returned[provider]}")
    if not (EAGER in a and EAGER in b):
        lines.append("without eager in both, seconds are compared, which include the machine's speed")
    for provider, errors in ((each, found.get("errors", {})) for each, found in a.items() if each in b):
        unknown = [what for what in errors if what not in b[provider].get("errors", {})]
        lines += [f"{provider}: error of {', '.join(unknown)} is measured only in A"] if unknown else []
        if "peak_extra_mib" in a[provider] and "peak_extra_mib" not in b[provider]:
            lines.append(f"{provider}: memory is measured only in A")
    turns = [len(next(iter(found.values()))["seconds_all"]) for found in (a, b) if found]
    if len(turns) == 2 and 1 / math.comb(sum(turns), turns[0]) >= SIGNIFICANT:
        lines.append(f"{turns[0]} and {turns[1]} turns are too few to tell a slowdown from noise; measure 5 or more")
    return sorted(lines)


def newly_failed(before: dict, after: dict) -> list[str]:
    gone = missing(after)
    return [
        f"{provider}: does not run now: {gone[provider]}"
        for provider in measured(before)
        if is_ours(provider) and provider in gone
    ]


def compare_case(before: dict, after: dict) -> list[Change]:
    """Return the changes of the providers that ran in both."""
    a, b = measured(before), measured(after)
    raw_only = not (EAGER in a and EAGER in b)
    return [change(provider, a, b, after["dtype"], raw_only) for provider in a if provider in b]


def change(provider: str, before: dict, after: dict, dtype: str, raw_only: bool) -> Change:
    turns = [found[provider]["seconds_all"] if raw_only else ratios(provider, found) for found in (before, after)]
    a, b = before[provider], after[provider]
    ratio = statistics.median(turns[1]) / statistics.median(turns[0])
    p_slower, p_faster = (
        float(stats.mannwhitneyu(turns[1], turns[0], alternative=side).pvalue) for side in ("greater", "less")
    )
    flags = []
    if is_ours(provider):
        if ratio > SLOWER and p_slower < SIGNIFICANT:
            flags.append(f"{ratio - 1:.0%} slower{'' if raw_only else ' relative to eager'} (p {p_slower:.0e})")
        flags += [*larger(a, b), *worse(a, b, dtype)]
    raw = b["seconds"] / a["seconds"]
    return Change(provider, a, b, ratio, raw, raw_only, p_slower, p_faster, tuple(flags))


def ratios(provider: str, found: dict[str, dict]) -> list[float]:
    """Return times relative to eager, turn by turn."""
    turns, eager = found[provider]["seconds_all"], found[EAGER]["seconds_all"]
    if len(turns) != len(eager):
        raise UserError(f"{provider}: seconds_all has {len(turns)} turns, eager's {len(eager)}; measure again")
    return [ours / theirs for ours, theirs in zip(turns, eager)]


def larger(before: dict, after: dict) -> list[str]:
    a, b = before.get("peak_extra_mib"), after.get("peak_extra_mib")
    if a is None or b is None or b <= max(LARGER * a, a + LARGER_MIB):
        return []
    return [f"memory {a:,.0f} -> {b:,.0f} MiB"]


def worse(before: dict, after: dict, dtype: str) -> list[str]:
    """Return the errors that got worse; NaN is worse than any number."""
    found = []
    errors = after.get("errors", {})
    for what, a in ((what, a) for what, a in before.get("errors", {}).items() if what in errors):
        b = errors[what]
        rounding = STATISTICS_ROUNDING if what in STATISTICS else GRADIENT_ROUNDING[dtype]
        if not b <= max(WORSE * a, rounding) and not math.isnan(a):
            found.append(f"error of {what} {a:.1e} -> {b:.1e}")
    return found


def text(found: Comparison) -> str:
    columns = ("", "vs eager, A", "B", "change", "raw", "MiB, A", "B", "")
    parts = [f"**{title}**\n\n{report.table(columns, map(row, changes))}" for title, changes in found.cases]
    flagged = [f"REGRESSION {line}" for line in found.flagged] or ["no regression of ours"]
    return "\n".join([*parts, report.bullets([*found.notes, *flagged])])


def row(each: Change) -> list[str]:
    memory = [
        f"{found['peak_extra_mib']:,.0f}" if "peak_extra_mib" in found else "" for found in (each.before, each.after)
    ]
    vs_eager = ["" if each.raw_only else f"{found['time_ratio']:.3f}" for found in (each.before, each.after)]
    changed = "" if each.raw_only else f"{each.ratio - 1:+.1%}"
    return [each.provider, *vs_eager, changed, f"{each.raw - 1:+.1%}", *memory, each.verdict]


if __name__ == "__main__":
    sys.exit(main())
