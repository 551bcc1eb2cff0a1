"""Reading the reports of `bench.kernels`: where they lie, which case is which, what is ours, what a case is called."""

import json
import re
from pathlib import Path

from mssr.errors import UserError

KERNELS, SCALING = "kernels.json", "scaling.json"
CASE_KEYS = ("model", "n", "d", "v", "dtype", "rows", "task", "softcap")
TASKS = {"loss": "forward and backward", "frozen": "forward and backward, frozen head", "forward": "forward alone"}
EAGER = "eager"  # what all others are measured against


def load(path: Path, name: str = KERNELS) -> dict:
    """The report at `path`, or of that `name` in the folder `path`.

    Raises:
        UserError: there is none, or what is there is no such report.
    """
    file = path / name if path.is_dir() else path
    try:
        report = json.loads(_with_mode_names(file.read_text()))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{file}: is no JSON ({error})") from None
    if not isinstance(report, dict) or not isinstance(report.get("cases"), list):
        raise UserError(f"{file}: has no list `cases`, so it is no report of this version; measure again")
    return report


def _with_mode_names(text: str) -> str:
    """Reports up to November 2026 call the modes of our kernels by letters."""
    modes = {"L": "exact", "S": "sparse", "G": "recompute"}
    return re.sub(r"\b(mssr (?:chunked )?)([LSG])\b", lambda found: found[1] + modes[found[2]], text)


def load_kernels(path: Path) -> dict:
    """`load`, with cases that can be told apart."""
    report = load(path)
    names = [name(case) for case in report["cases"]]
    twice = next((each for each in names if names.count(each) > 1), None)
    if twice:
        raise UserError(f"{path}: has the case `{twice}` twice")
    return report


def key(case: dict) -> tuple:
    return tuple(case.get(part) for part in CASE_KEYS)


def name(case: dict) -> str:
    """One line that tells the case from all others."""
    model = [f"{case['model']} head"] if case.get("model") else []
    softcap = [f"softcap {case['softcap']:g}"] if case.get("softcap") else []
    shape = f"N {case['n']:,}, D {case['d']:,}, V {case['v']:,}"
    return ", ".join(
        [TASKS.get(case["task"], case["task"]), *model, shape, case["dtype"], f"{case['rows']} rows", *softcap]
    )


def is_ours(provider: str) -> bool:
    return provider.startswith("mssr")


def measured(case: dict) -> dict[str, dict]:
    """The providers that ran, by name."""
    return {provider: found for provider, found in case["providers"].items() if "error" not in found}


def failed(case: dict) -> dict[str, str]:
    """The errors of those that did not."""
    return {provider: found["error"] for provider, found in case["providers"].items() if "error" in found}


def spoilt(cases: list[dict]) -> str:
    """A sentence on the times that the host spoilt (`bench.steal`); "" where there is none."""
    results = [found for case in cases for found in measured(case).values() if "seconds_all" in found]
    count = sum(found.get("spoilt", 0) for found in results)
    runs = sum(len(found["seconds_all"]) for found in results)
    return f"{count} of {runs} times are of runs during which the host gave the processors to others" if count else ""


def facts(machine: dict) -> str:
    """The device first, then versions."""
    rest = (f"{fact} {value}" for fact, value in machine.items() if fact != "device")
    return ", ".join([machine["device"], *rest])


def seconds(value: float) -> str:
    """Three digits, in the unit that suits."""
    return f"{value:.3g} s" if value >= 0.9995 else f"{1e3 * value:.3g} ms"


def mib(value: float) -> str:
    return f"{value / 1024:.2f} GiB" if value >= 10240 else f"{value:,.0f} MiB"
