"""Check that `make test` notices small mistakes: make each one in a copy of the checkout and run the tests there.

    python -m tests.mutants               every fault
    python -m tests.mutants NAME...       these faults, or all of a file in faults/
    options: --jobs 2 (copies side by side), --list

The tests that the fault lists run first; if they pass, all of `make test` runs. Writes the rows of these faults into
tests/mutants/README.md. The exit code is 1 if a fault goes unnoticed, or if tests fail without any fault.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

from .faults import ROOT, TABLE, Fault, all_faults, escaped, table

LIMIT = 900  # seconds for the tests that a fault lists; a fault can make them hang
WORDS = """# Mutants

Does `make test` notice small mistakes? `faults/*.toml` lists some, over all packages. `python -m tests.mutants`
makes each one in a copy of the checkout, runs the tests that should notice it, then, if these pass, all of `make test`, and
writes this table. `python -m tests.mutants NAME` tries one fault, or one file of faults. "s" is seconds until the first
failing test, imports included, with two faults side by side on two cores.

A fault replaces text that occurs once in its file; `tests/mutants/test_faults.py` fails when the code has moved away from it.
"""


class Found(NamedTuple):
    by: str | None  # the first test that failed, if any
    named: bool  # whether that is one of the tests that the fault lists
    seconds: float

    def row(self, fault: Fault) -> str:
        by = "**nothing**" if self.by is None else f"`{self.by}`"
        return f"| {fault.name} | {escaped(fault.fault)} | {escaped(by)} | {self.seconds:.0f} |"


def main() -> None:
    arguments = parse_arguments()
    faults = chosen(arguments.names)
    if arguments.list:
        for fault in faults:
            print(f"{fault.group:<26} {fault.name:<42} {fault.fault}")
        return
    with tempfile.TemporaryDirectory(prefix="mutants_") as folder:
        copies = [copy_checkout(Path(folder) / str(number)) for number in range(arguments.jobs)]
        if failing := without_fault(copies[0], faults):
            sys.exit(f"{failing} fails without any fault: fix that first")
        found = try_all(faults, copies)
    write_table({fault.name: found[fault.name].row(fault) for fault in faults})
    print(f"written: {TABLE.relative_to(ROOT)}")
    missed = [fault.name for fault in faults if found[fault.name].by is None]
    print(
        f"{len(faults) - len(missed)} of {len(faults)} faults are noticed"
        + "".join(f"\n  not noticed: {m}" for m in missed)
    )
    sys.exit(bool(missed))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="a fault, or a file of faults without its ending")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="show them and end")
    return parser.parse_args()


def chosen(names: Sequence[str]) -> list[Fault]:
    faults = all_faults()
    if unknown := set(names) - faults.keys() - {fault.group for fault in faults.values()}:
        sys.exit(f"no such fault, nor a file of faults: {', '.join(sorted(unknown))}; see --list")
    return [fault for fault in faults.values() if not names or {fault.name, fault.group} & set(names)]


def copy_checkout(folder: Path) -> Path:
    """Copy the files that git does not ignore: no virtual environment, no runs, no stale bytecode."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def without_fault(copy: Path, faults: Sequence[Fault]) -> str | None:
    """Return the first of the listed tests that fails without any fault."""
    files = list(dict.fromkeys(test for fault in faults for test in fault.tests))
    print(f"{len(files)} files of tests without a fault ...", flush=True)
    return first_failure(copy, files, jobs=2)


def try_all(faults: Sequence[Fault], copies: Sequence[Path]) -> dict[str, Found]:
    free: SimpleQueue[Path] = SimpleQueue()
    for copy in copies:
        free.put(copy)

    def attempt(fault: Fault) -> Found:
        copy = free.get()
        try:
            found = noticed(fault, copy)
        finally:
            free.put(copy)
        among = "" if found.named else " (not among its tests)"
        print(f"{fault.name:<42} {found.seconds:6.1f} s  {found.by or 'NOT NOTICED'}{among}", flush=True)
        return found

    with ThreadPoolExecutor(len(copies)) as pool:
        return dict(zip((fault.name for fault in faults), pool.map(attempt, faults)))


def noticed(fault: Fault, copy: Path) -> Found:
    began = time.monotonic()
    with made(fault, copy):
        by, named = first_failure(copy, fault.tests, limit=LIMIT), True
        if by is None:
            # tests/mutants would notice every fault.
            by, named = first_failure(copy, ["tests", "--ignore=tests/mutants"]), False
    if not named and by is not None and first_failure(copy, [by]):
        by = None  # it fails without the fault, too
    return Found(by, named, time.monotonic() - began)


@contextmanager
def made(fault: Fault, copy: Path):
    file = copy / fault.file
    text = file.read_text()
    file.write_text(fault.applied(copy))
    try:
        yield
    finally:
        file.write_text(text)


def first_failure(copy: Path, tests: Sequence[str], jobs: int = 0, limit: float | None = None) -> str | None:
    """Run those of these tests that are in `make test`. Return the first failure; exceeding the limit counts as one.

    Raises:
        RuntimeError: pytest itself failed.
    """
    paths = [str(copy), str(copy / "kernels")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"}
    with tempfile.TemporaryDirectory(dir=copy.parent) as temporary:
        options = ["-q", "-x", "-rfE", "-m", "not slow", "-p", "no:cacheprovider", f"--basetemp={temporary}/tests"]
        command = [sys.executable, "-m", "pytest", *options, *(["-n", str(jobs)] if jobs else []), *tests]
        try:
            run = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return f"{tests[0]} (no end after {limit} s)"
    if run.returncode in (0, 5):  # 5: none of them is in `make test`
        return None
    if failed := re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", run.stdout, re.MULTILINE):
        return failed[1]
    raise RuntimeError(f"pytest ended with {run.returncode}: {(run.stdout + run.stderr).strip()[-500:]}")


def write_table(rows: dict[str, str]) -> None:
    """Write the table. rows: new rows by fault; those of other faults stay."""
    rows = table() | rows
    faults = all_faults()
    lines = [WORDS]
    for group in dict.fromkeys(fault.group for fault in faults.values()):
        lines += [
            f"\n## {group.replace('_', ' ')}\n",
            "| mutant | what is wrong | noticed by | s |",
            "|---|---|---|---|",
        ]
        lines += [rows[name] for name, fault in faults.items() if fault.group == group and name in rows]
    TABLE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
