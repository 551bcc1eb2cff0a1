"""Where ours lose: every case in which somebody else is faster or smaller, as sentences made from the figures alone."""

from collections.abc import Callable

from .jobs import POLICY

SPECIFICATION = "mssr reference"  # is there to be read, not to be fast
FIGURES = (("seconds", "faster", 1e3, "ms"), ("peak_extra_mib", "smaller", 1, "MiB"))


def sentences(report: dict, name_of: Callable[[dict], str]) -> list[str]:
    """One for each case and provider that is faster or smaller than one of ours; in each case those that do the same work
    come first. name_of: what a case is called. [] where there is none in what was measured."""
    return [
        f"{name_of(case)}: {name}{said} is {' and '.join(lost)}."
        for case in report["cases"]
        for name, said, lost in sorted(_losses(case), key=lambda loss: loss[1] != "")
    ]


def _losses(case: dict) -> list[tuple[str, str, list[str]]]:
    measured = {name: found for name, found in case["providers"].items() if "error" not in found}
    ours = {name: found for name, found in measured.items() if name.startswith("mssr") and name != SPECIFICATION}
    found = []
    for name, result in measured.items():
        objective = result["work"].split(";")[0]
        said = "" if objective == POLICY else f" (less work: {objective})"
        lost = [words for figure in FIGURES if (words := _behind(result, ours, *figure))]
        if not name.startswith("mssr") and lost:
            found.append((name, said, lost))
    return found


def _behind(theirs: dict, ours: dict[str, dict], key: str, word: str, scale: float, unit: str) -> str:
    """ "" where none of ours is."""
    if key not in theirs:
        return ""
    behind = {name: result[key] * scale for name, result in ours.items() if result.get(key, 0) > theirs[key]}
    those = ", ".join(f"{name} ({_digits(value)})" for name, value in behind.items())
    return f"{word} ({_digits(theirs[key] * scale)} {unit}) than {those}" if behind else ""


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
