"""The results table, in Markdown."""

from statistics import fmean

from bench.study.recorded import ACCURACY, Match
from bench.study.results import KEPT_OF_BEST, StudyResults
from bench.study.statistics import Estimate
from bench.study.summary import ArmSummary, ReachedBy, summarise

MATCHED = {
    "updates": "{budget} optimiser updates per run",
    "rollouts": "{budget} rollouts per run, with the initialisation of value trackers",
    "tokens": "{budget} generated tokens per run, with the initialisation of value trackers",
    "seconds": "{budget} seconds of training per run, without validation",
}

COSTS: dict[Match, str] = {
    "updates": "updates",
    "rollouts": "rollouts",
    "tokens": "tokens, k",
    "seconds": "seconds (CPU)",
}


def results_table(results: StudyResults) -> str:
    """Return the table, one row per arm, with a legend. Deterministic."""
    summaries = summarise(results)
    head = [
        "arm",
        "final accuracy, %",
        "best, %",
        "mean over the run, %",
        f"final − {next(iter(results.arms))}, points",
        "collapsed",
        *(f"updates / rollouts to {threshold:.0%}" for threshold in _reached(summaries)),
        *(title for name, title in COSTS.items() if name != results.match),
    ]
    rows = [_row(summary, results.match, _reached(summaries)) for summary in summaries]
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---", *["---:"] * (len(head) - 1)], *rows)]
    return "\n".join([*lines, "", _legend(results, summaries)]) + "\n"


def matching(results: StudyResults) -> str:
    """Return the budget of every run."""
    return MATCHED[results.match].format(budget=f"{results.budget:,.10g}")


def in_percent(estimate: Estimate) -> str:
    """Return a share with its interval."""
    if estimate.low is None:
        return f"{100 * estimate.mean:.1f}"
    return f"{100 * estimate.mean:.1f} ± {100 * (estimate.high - estimate.mean):.1f}"


def _reached(summaries: list[ArmSummary]) -> list[float]:
    """Return the thresholds that some run reached."""
    return sorted({reached.threshold for summary in summaries for reached in summary.reached if reached.count})


def _row(summary: ArmSummary, match: Match, thresholds: list[float]) -> list[str]:
    difference = summary.difference
    apart = difference is not None and difference.low is not None and (difference.low > 0 or difference.high < 0)
    costs = {
        "updates": f"{summary.spent['updates']:,.0f}",
        "rollouts": f"{summary.spent['rollouts']:,.0f}",
        "tokens": f"{summary.spent['tokens'] / 1000:,.0f}",
        "seconds": f"{summary.spent['seconds']:,.0f} ({summary.cpu_seconds:,.0f})",
    }
    return [
        summary.arm,
        in_percent(summary.final),
        in_percent(summary.best),
        in_percent(summary.auc),
        f"**{_in_points(difference)}**" if apart else _in_points(difference),
        f"{summary.collapsed}/{summary.runs}" + (f" ({summary.diverged} diverged)" if summary.diverged else ""),
        *(_to(reached, summary.runs) for reached in summary.reached if reached.threshold in thresholds),
        *(cost for name, cost in costs.items() if name != match),
    ]


def _in_points(difference: Estimate | None) -> str:
    if difference is None:
        return "–"
    if difference.low is None:
        return f"{100 * difference.mean:+.1f}"
    return f"{100 * difference.mean:+.1f} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"


def _to(reached: ReachedBy, runs: int) -> str:
    if reached.spent is None:
        return f"– (0/{runs})"
    return f"{reached.spent['updates']:,.0f} / {reached.spent['rollouts']:,.0f} ({reached.count}/{runs})"


def _start_costs(results: StudyResults) -> list[str]:
    """Return the rollouts that value trackers used before the first update."""
    paid: dict[float, list[str]] = {}
    for arm in results.arms_with_runs:
        rollouts = fmean(
            run.curves.spent["rollouts"][0] if run.curves.steps[0] == 0 else 0 for run in results.of_arm(arm)
        )
        if rollouts:
            paid.setdefault(rollouts, []).append(arm)
    costs = "; ".join(f"{rollouts:,.0f} rollouts per run ({', '.join(arms)})" for rollouts, arms in paid.items())
    start = "Rollouts, tokens and seconds include the initialisation of the value tracker before the first update"
    return [f"{start}: {costs}."] if paid else []


def _validations(results: StudyResults) -> int:
    return max(len(run.curves.points(ACCURACY, "updates")[0]) for run in results.runs)


def _legend(results: StudyResults, summaries: list[ArmSummary]) -> str:
    first = next(iter(results.arms))
    seeds = max(summary.runs for summary in summaries)
    lines = [
        f"Budget: {matching(results)}. Accuracies are on held-out problems.",
        ("± and brackets are 95 % t-intervals over the seeds. " if seeds > 1 else "One seed, so there is no interval. ")
        + f"final − {first} is paired: runs of one seed share warm start and data order."
        + (" Bold: the interval does not contain 0." if seeds > 1 else ""),
        f"Best is the highest of {_validations(results)} validations, so it is biased upwards for all arms. Mean over the "
        "run: area under the validation curve, divided by the length of the matched axis.",
        f"Collapsed: the run diverged, or ended below {KEPT_OF_BEST:.0%} of its best validation, the first one included. The "
        "final accuracy of a diverged run counts as 0.",
        "Updates, rollouts, tokens and seconds are means per run, of training without validation; CPU seconds are those of "
        "the whole process."
        + (f" {results.jobs} runs at a time shared the machine, so compare CPU seconds." if results.jobs > 1 else ""),
        *_start_costs(results),
    ]
    if results.thresholds:
        lines.append(
            "The cost to a threshold is that at the first validation at or above it, averaged over the runs that reached it "
            "(their number is in parentheses)."
        )
    if results.missing:
        lines.append(f"**Not finished and not in this table: {', '.join(results.missing)}.**")
    return "\n".join(f"- {line}" for line in lines)
