"""Reports: what every benchmark writes, reads and prints. `bench.tables` makes the tables in them.

A provider's entry in a case holds its figures; or `skipped`, why it cannot run here ("not installed: pip install trl");
or `error`, why it failed.
"""

import datetime
import json
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from mssr.errors import UserError

from . import machine

KERNELS, SCALING = "kernels.json", "scaling.json"
CASE_KEYS = ("model", "n", "d", "v", "dtype", "rows", "task", "softcap")
TASKS = {"loss": "forward and backward", "frozen": "forward and backward, frozen head", "forward": "forward alone"}
EAGER = "eager"  # what all others are compared with


def new(command: str, words: list[str] | None, device: str, settings: dict) -> dict:
    """Return an empty report. words: the command's arguments; None: those of this process."""
    return {
        "command": shlex.join(["python", "-m", command, *(sys.argv[1:] if words is None else words)]),
        "date": datetime.date.today().isoformat(),
        "machine": machine.facts(device),
        "settings": settings,
        "cases": [],
        "not_run": [],
    }


def save(report: dict, path: Path | None) -> None:
    """Write the report, if there is a path."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n")


def show(text: str) -> None:
    """Print Markdown, tables aligned."""
    Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(Markdown(text))


def load(path: Path, name: str = KERNELS) -> dict:
    """Return the report at `path`, or the one called `name` in the folder `path`.

    Raises:
        UserError: there is none, or the file is no report.
    """
    file = path / name if path.is_dir() else path
    try:
        report = json.loads(file.read_text())
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{file}: is not JSON ({error})") from None
    if not isinstance(report, dict) or not isinstance(report.get("cases"), list):
        raise UserError(f"{file}: has no list `cases`, so it is not a report of this version; measure again")
    return report


def load_kernels(path: Path) -> dict:
    """Return a report of `bench.kernels`; its cases differ from each other.

    Raises:
        UserError: as `load`, or a case occurs twice.
    """
    report = load(path)
    names = [name(case) for case in report["cases"]]
    twice = next((each for each in names if names.count(each) > 1), None)
    if twice:
        raise UserError(f"{path}: has the case `{twice}` twice")
    return report


def key(case: dict) -> tuple:
    return tuple(case.get(part) for part in CASE_KEYS)


def name(case: dict) -> str:
    """Return one line that tells the case from all others."""
    model = [f"{case['model']} head"] if case.get("model") else []
    softcap = [f"softcap {case['softcap']:g}"] if case.get("softcap") else []
    shape = f"N {case['n']:,}, D {case['d']:,}, V {case['v']:,}"
    return ", ".join(
        [TASKS.get(case["task"], case["task"]), *model, shape, case["dtype"], f"{case['rows']} rows", *softcap]
    )


def is_ours(provider: str) -> bool:
    return provider.startswith("mssr")


def measured(case: dict) -> dict[str, dict]:
    """Return the providers that ran, by name."""
    return {provider: found for provider, found in case["providers"].items() if "seconds" in found}


def missing(case: dict) -> dict[str, str]:
    """Return why each of the others did not run."""
    return {provider: why(found) for provider, found in case["providers"].items() if "seconds" not in found}


def failures(case: dict) -> dict[str, str]:
    """Return the errors of the providers that failed; those that are not installed did not fail."""
    return {provider: found["error"] for provider, found in case["providers"].items() if "error" in found}


def why(found: dict) -> str:
    """Return why there are no figures: "not installed: ...", "needs a CUDA device", or "failed: ..."."""
    return found["skipped"] if "skipped" in found else f"failed: {found['error']}"


def spoilt(cases: list[dict]) -> str:
    """Return a sentence on the times that the host spoilt (`bench.steal`), or ""."""
    results = [found for case in cases for found in measured(case).values() if "seconds_all" in found]
    count = sum(found.get("spoilt", 0) for found in results)
    runs = sum(len(found["seconds_all"]) for found in results)
    return f"{count} of {runs} times are of runs during which the host gave the processors to others" if count else ""


def facts(report: dict) -> str:
    """Return the machine in words: the device first, then versions."""
    rest = (f"{fact} {value}" for fact, value in report["machine"].items() if fact != "device")
    return ", ".join([report["machine"]["device"], *rest])


# Numbers and Markdown.


def seconds(value: float) -> str:
    """Return three digits, in seconds or milliseconds."""
    return f"{value:.3g} s" if value >= 0.9995 else f"{1e3 * value:.3g} ms"


def mib(value: float) -> str:
    return f"{value / 1024:.2f} GiB" if value >= 10240 else f"{value:,.0f} MiB"


def number(found: dict, what: str, form: str = ".2f") -> str:
    return format(found[what], form) if found.get(what) is not None else ""


def title(provider: str) -> str:
    return f"**{provider}**" if is_ours(provider) else provider


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table; short rows are filled up."""
    header = list(header)
    lines = [header, ["---"] * len(header), *([*row, *[""] * len(header)][: len(header)] for row in map(list, rows))]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def bullets(lines: Iterable[str]) -> str:
    return "".join(f"- {line}\n" for line in lines)
