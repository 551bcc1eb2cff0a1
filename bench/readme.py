"""Benchmark tables of the READMEs, generated from the committed results, and a page for each folder of results.

    python -m bench.readme [--check]

Between `<!-- bench:NAME -->` and `<!-- /bench -->` in the READMEs and docs/BENCHMARKS.md stands what is generated from
NAME.json, a report of kernels (`kernels` or `kernels_<what>`), `step` or `scaling`: for each machine from the newest folder
below bench/results that has one. Folders are named <machine>_<date>; those with a report of kernels also get a README.md with
every case and the plots. --check writes nothing and exits with 1 if a file differs from what it should be, 2 on a mistake.
"""

import argparse
import os
import re
import sys
from pathlib import Path

from mssr.errors import UserError

from . import tables
from .child import ROOT
from .plots import PICTURE
from .report import KERNELS, SCALING, load, load_kernels

READMES = ("README.md", "docs/BENCHMARKS.md", "kernels/README.md")
RESULTS = "bench/results"
OPEN, CLOSE = r"<!-- bench:([\w-]+) -->\n", "<!-- /bench -->"
MAIN_TASK = "loss"
ALL_KERNELS = "kernels*.json"


def main(words: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 if a file differs from its results")
    arguments = parser.parse_args(words)
    try:
        differing = {file: text for file, text in generated(root).items() if text != read(file)}
    except UserError as error:
        print(f"bench.readme: {error}", file=sys.stderr)
        return 2
    found = "differs from the results; run python -m bench.readme" if arguments.check else "written"
    for file, text in differing.items():
        print(f"{file.relative_to(root)}: {found}")
        if not arguments.check:
            file.write_text(text)
    return int(arguments.check and bool(differing))


def generated(root: Path) -> dict[Path, str]:
    """Return what each file should hold.

    Raises:
        UserError: a marker has an unknown name, no end, or no results.
    """
    files = [root / file for file in READMES if (root / file).exists()]
    found = {file: rewritten(file.read_text(), file, root) for file in files}
    for report in sorted((root / RESULTS).glob(f"*/{ALL_KERNELS}")):
        found[report.parent / "README.md"] = page(report.parent)
    return found


def read(file: Path) -> str | None:
    return file.read_text() if file.exists() else None


def rewritten(text: str, file: Path, root: Path) -> str:
    """Return the text with every marked part generated anew."""
    whole = re.compile(f"{OPEN}(?:(?!{OPEN}).)*?{CLOSE}", re.DOTALL)
    if broken := re.search(OPEN, whole.sub("", text)):
        raise UserError(f"{file.name}: <!-- bench:{broken[1]} --> has no {CLOSE} after it; add one")
    return whole.sub(lambda found: f"<!-- bench:{found[1]} -->\n{block(found[1], file, root)}{CLOSE}", text)


def block(marker: str, file: Path, root: Path) -> str:
    kinds = {"kernels": kernels, "step": step, "scaling": scaling}
    write = kinds.get(marker.partition("_")[0])
    if write is None:
        raise UserError(f"{file.name}: <!-- bench:{marker} -->: unknown; known are {', '.join(kinds)}")
    reports = newest(root / RESULTS, f"{marker}.json")
    if not reports:
        raise UserError(f"{file.name}: <!-- bench:{marker} -->: no {marker}.json in a folder of {RESULTS}; measure one")
    links = {report: os.path.relpath(report.parent, file.parent) for report in reports}
    return "\n" + "\n".join(write(report, link) for report, link in links.items()) + "\n"


def newest(results: Path, name: str) -> list[Path]:
    """Return, for each machine, the report of that name in its newest folder with one."""
    reports = {}
    for report in sorted(results.glob(f"*_*/{name}")):
        machine, _, _ = report.parent.name.rpartition("_")
        reports[machine] = report  # dates sort as their names do
    return list(reports.values())


def kernels(file: Path, link: str) -> str:
    """The first case of the main task, and where ours lose in all of them. link: to the folder."""
    report = load_kernels(file)
    cases = report["cases"]
    if not cases:
        raise UserError(f"{file.parent.name}/{file.name}: no case was measured; measure again")
    main_case = next((case for case in cases if case["task"] == MAIN_TASK), cases[0])
    parts = [tables.kernels_case(main_case), tables.where_we_lose(cases), tables.caveats(cases)]
    parts.append(f"{tables.provenance(report)}[Every case, with plots]({link}/README.md).\n")
    return "\n".join([*parts, *picture(file, link)])


def step(file: Path, link: str) -> str:
    return tables.step(load(file))


def scaling(file: Path, link: str) -> str:
    return tables.scaling(load(file))


def picture(file: Path, link: str) -> list[str]:
    there = file.name == KERNELS and (file.parent / PICTURE).exists()
    return [f"![time and memory]({link}/{PICTURE})\n"] if there else []


def page(folder: Path) -> str:
    """The folder's README: every case of its reports of kernels."""
    parts = ["# " + folder.name.replace("_", ", ") + "\n", "Generated by `python -m bench.readme`.\n"]
    for file in sorted(folder.glob(ALL_KERNELS)):
        parts += [tables.kernels(load_kernels(file)), *picture(file, ".")]
    if (folder / SCALING).exists():
        parts.append(scaling(folder / SCALING, "."))
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
