"""Benchmark tables of the READMEs, generated from the committed results, and a page for each folder of these.

    python -m bench.readme [--check]

Between `<!-- bench:NAME -->` and `<!-- /bench -->` in docs/BENCHMARKS.md and the READMEs is what is generated from NAME.json,
a report of kernels (`kernels`, or `kernels_` and what of), `step` or `scaling`: of the newest folder below bench/results
that has it, for each machine. Folders are named <machine>_<date>. Those with a report of kernels also get a README.md of
their own: every case, and the plots that are there.
--check writes nothing and exits with 1 if a file is not what would be written; 2 is a mistake.
"""

import argparse
import os
import re
import sys
from pathlib import Path

from mssr.errors import UserError

from . import losses, markdown
from .reports import KERNELS, SCALING, load, load_kernels, name

ROOT = Path(__file__).resolve().parents[1]
READMES = ("README.md", "docs/BENCHMARKS.md", "kernels/README.md")
RESULTS = "bench/results"
PLOTS = ("time.png", "memory.png", "roof.png", "accuracy.png", "scaling.png")
OPEN, CLOSE = re.compile(r"<!-- bench:([\w-]+) -->\n"), "<!-- /bench -->"
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
    """File -> what it should hold.

    Raises:
        UserError: a marker with an unknown name or without its end, or no results for it.
    """
    files = [root / file for file in READMES if (root / file).exists()]
    found = {file: rewritten(file.read_text(), file, root) for file in files}
    for report in sorted((root / RESULTS).glob(f"*/{ALL_KERNELS}")):
        found[report.parent / "README.md"] = page(report.parent)
    return found


def read(file: Path) -> str | None:
    return file.read_text() if file.exists() else None


def rewritten(text: str, file: Path, root: Path) -> str:
    """The text with every marked part generated anew."""
    pieces, at = [], 0
    while marker := OPEN.search(text, at):
        end = text.find(CLOSE, marker.end())
        following = OPEN.search(text, marker.end())
        if end < 0 or (following and following.start() < end):
            raise UserError(f"{file.name}: <!-- bench:{marker[1]} --> has no {CLOSE} after it; add one")
        pieces += [text[at : marker.end()], block(marker[1], file, root)]
        at = end
    return "".join([*pieces, text[at:]])


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
    """For each machine the report of that name in its newest folder with one."""
    reports = {}
    for report in sorted(results.glob(f"*_*/{name}")):
        machine, _, _ = report.parent.name.rpartition("_")
        reports[machine] = report  # dates sort as their names do
    return list(reports.values())


def kernels(file: Path, link: str) -> str:
    """The first case of the main task in full, the others in short. link: to the folder."""
    report = load_kernels(file)
    cases = report["cases"]
    if not cases:
        raise UserError(f"{file.parent.name}/{file.name}: no case was measured; measure again")
    main_case = next((case for case in cases if case["task"] == MAIN_TASK), cases[0])
    others = [case for case in cases if case is not main_case]
    parts = [markdown.kernels_case(main_case), *([markdown.kernels_overview(others)] if others else [])]
    parts += [
        losses.where_we_lose(cases),
        markdown.caveats(cases),
        f"{markdown.provenance(report)}[Every case, with plots]({link}/README.md).\n",
    ]
    return "\n".join([*parts, *(plots(file.parent, link, PLOTS[:1]) if file.name == KERNELS else [])])


def step(file: Path, link: str) -> str:
    report = load(file)
    missing = [key for key in ("command", "date") if key not in report]
    if missing:
        raise UserError(
            f"{file.parent.name}/{file.name}: no `{missing[0]}`, so it is of an older version; measure again"
        )
    return "\n".join([markdown.step(report), losses.where_we_lose([step_as_case(report)]), markdown.provenance(report)])


def step_as_case(report: dict) -> dict:
    """In the words of `bench.kernels`, so that one function says where ours lose."""
    providers = {}
    for case in report["cases"]:
        ran = "seconds" in case
        providers[case["head"]] = case | (
            {"peak_extra_mib": 1024 * case["extra_gib"]} if ran else {"error": case.get("error", "skipped")}
        )
    return {"providers": providers}


def scaling(file: Path, link: str) -> str:
    report = load(file)
    return "\n".join(
        [markdown.scaling(report), markdown.provenance(report), *plots(file.parent, link, ("scaling.png",))]
    )


def plots(folder: Path, link: str, names: tuple[str, ...]) -> list[str]:
    return [f"![{Path(picture).stem}]({link}/{picture})\n" for picture in names if (folder / picture).exists()]


def page(folder: Path) -> str:
    """The folder's README: every case of its reports of kernels."""
    parts = ["# " + folder.name.replace("_", ", ") + "\n", "Generated by `python -m bench.readme`.\n"]
    for file in sorted(folder.glob(ALL_KERNELS)):
        report = load_kernels(file)
        parts += [markdown.provenance(report), *map(markdown.kernels_case, report["cases"])]
        parts += [losses.where_we_lose(report["cases"]), markdown.caveats(report["cases"]), "Singly:\n"]
        parts += ["\n".join(f"- {sentence}" for sentence in losses.sentences(report, name)) + "\n"]
        parts += ["\n".join(f"- not run: {line}" for line in report.get("not_run", [])) + "\n"]
        parts += plots(folder, ".", PLOTS[:4]) if file.name == KERNELS else []
    if (folder / SCALING).exists():
        parts.append(scaling(folder / SCALING, "."))
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
