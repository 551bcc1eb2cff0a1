"""Reports, which every benchmark writes, reads and prints. `bench.tables` makes their tables.

A provider's entry in a case holds its figures; or `skipped`, why it cannot run here ("not installed: pip install trl");
or `error`, why it failed.
"""

import datetime
import json
import os
import shlex
import sys
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from mssr.errors import UserError

from . import machine

KERNELS, SCALING = "kernels.json", "scaling.json"
TASKS = {"loss": "forward and backward", "frozen": "forward and backward, frozen head", "forward": "forward alone"}
EAGER = "eager"  # all others are compared with it


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


def file_at(where: Path | None, name: str) -> Path | None:
    """Return the file that --out means: FILE.json itself, or the one called `name` in a folder."""
    return where and (where if where.suffix == ".json" else where / name)


def refuse_other_file(path: Path | None) -> None:
    """Check that a report may be written there.

    Raises:
        UserError: a file is there that is no report.
    """
    if path is None or not os.path.lexists(path):
        return
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or "machine" not in found:
        raise UserError(f"{path}: already there, and no report of a benchmark; name another file")


def save(report: dict, path: Path | None) -> None:
    """Write the report, if there is a path, whole or not at all; an earlier report there is replaced.

    Raises:
        UserError: as `refuse_other_file`.
    """
    if path:
        refuse_other_file(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".partial_{os.getpid()}_{path.name}")
        partial.write_text(json.dumps(report, indent=2) + "\n")
        partial.replace(path)


def show(text: str) -> None:
    """Print Markdown, tables aligned."""
    Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(Markdown(text))


def load(path: Path, name: str = KERNELS) -> dict:
    """Return the report at `path`, or the one called `name` in the folder `path`.

    Raises:
        UserError: there is none, or the file is no report, or one without cases.
    """
    file = path / name if path.is_dir() else path
    try:
        report = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as JSON ({error})") from None
    if not isinstance(report, dict) or not report.get("cases"):
        raise UserError(f"{file}: has no `cases`: not a report, or nothing was measured; run the benchmark again")
    return report


def name(case: dict) -> str:
    """Return one line that no other case of a report has."""
    model = [f"{case['model']} head"] if case.get("model") else []
    return ", ".join([TASKS[case["task"]], *model, size(case), f"{case['rows']} rows"])


def size(case: dict) -> str:
    return f"N {case['n']:,}, D {case['d']:,}, V {case['v']:,}, {case['dtype']}"


def is_ours(provider: str) -> bool:
    return provider.startswith("mssr")


def measured(case: dict) -> dict[str, dict]:
    """Return the providers that ran, by name."""
    return {provider: found for provider, found in case["providers"].items() if "seconds" in found}


def failures(case: dict) -> dict[str, str]:
    """Return the errors of the providers that failed; a missing package is not a failure."""
    return {provider: found["error"] for provider, found in case["providers"].items() if "error" in found}


def why(found: dict) -> str:
    """Return why there are no figures: "not installed: ...", "needs a CUDA device", or "failed: ..."."""
    return found["skipped"] if "skipped" in found else f"failed: {found['error']}"


def spoilt(cases: list[dict]) -> str:
    """Return a sentence on the times that steal time spoilt (`bench.steal`), or ""."""
    results = [found for case in cases for found in measured(case).values()]
    count = sum(found.get("spoilt", 0) for found in results)
    runs = sum(len(found["seconds_all"]) for found in results)
    return f"{count} of {runs} times are of runs during which the host gave the processors to others" if count else ""


def ratios(found: dict, base: dict) -> list[float]:
    """Return one provider's times relative to another's, turn by turn."""
    return [a / b for a, b in zip(found["seconds_all"], base["seconds_all"], strict=True)]


def facts(report: dict) -> str:
    """Return the machine in one line: the device first, then versions."""
    rest = (f"{fact} {value}" for fact, value in report["machine"].items() if fact != "device")
    return ", ".join([report["machine"]["device"], *rest])
