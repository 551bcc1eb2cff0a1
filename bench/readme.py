"""Benchmark tables of the READMEs, generated from the committed results, and a page for each folder of these.

    python -m bench.readme [--check]

Between `<!-- bench:NAME -->` and `<!-- /bench -->` in README.md and kernels/README.md stands what is generated: `kernels`,
`step` or `scaling`, of the newest folder below bench/results that has such a report, for each machine. Folders are named
<machine>_<date>. Those with a kernels.json also get a README.md of their own: every case, and the plots that are there.
--check writes nothing and exits with 1 if a file is not what would be written; 2 is a mistake.
"""

import argparse
import os
import re
import sys
from pathlib import Path

from mssr.errors import UserError

from . import losses, markdown
from .reports import KERNELS, SCALING, STEP, load, load_kernels, name

ROOT = Path(__file__).resolve().parents[1]
READMES = ("README.md", "kernels/README.md")
RESULTS = "bench/results"
PLOTS = ("time.png", "memory.png", "roof.png", "accuracy.png", "scaling.png")
OPEN, CLOSE = re.compile(r"<!-- bench:([\w-]+) -->\n"), "<!-- /bench -->"
MAIN_TASK = "loss"


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
    for report in sorted((root / RESULTS).glob(f"*/{KERNELS}")):
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


def block(kind: str, file: Path, root: Path) -> str:
    kinds = {"kernels": (KERNELS, kernels), "step": (STEP, step), "scaling": (SCALING, scaling)}
    if kind not in kinds:
        raise UserError(f"{file.name}: <!-- bench:{kind} -->: unknown; known are {', '.join(kinds)}")
    report, write = kinds[kind]
    folders = newest(root / RESULTS, report)
    if not folders:
        raise UserError(f"{file.name}: <!-- bench:{kind} -->: no {report} in a folder of {RESULTS}; measure one")
    links = {folder: os.path.relpath(folder, file.parent) for folder in folders}
    return "\n" + "\n".join(write(folder, link) for folder, link in links.items()) + "\n"


def newest(results: Path, report: str) -> list[Path]:
    """For each machine its newest folder with such a report."""
    folders = {}
    for found in sorted(results.glob(f"*_*/{report}")):
        machine, _, _ = found.parent.name.rpartition("_")
        folders[machine] = found.parent  # dates sort as their names do
    return list(folders.values())


def kernels(folder: Path, link: str) -> str:
    """The first case of the main task in full, the others in short."""
    report = load_kernels(folder)
    cases = report["cases"]
    if not cases:
        raise UserError(f"{folder.name}/{KERNELS}: no case was measured; measure again")
    main_case = next((case for case in cases if case["task"] == MAIN_TASK), cases[0])
    others = [case for case in cases if case is not main_case]
    parts = [markdown.kernels_case(main_case), *([markdown.kernels_overview(others)] if others else [])]
    parts += [
        losses.where_we_lose(cases),
        markdown.caveats(cases),
        f"{markdown.provenance(report)}[Every case, with plots]({link}/README.md).\n",
    ]
    return "\n".join([*parts, *plots(folder, link, PLOTS[:1])])


def step(folder: Path, link: str) -> str:
    report = load(folder, STEP)
    missing = [key for key in ("command", "date") if key not in report]
    if missing:
        raise UserError(f"{folder.name}/{STEP}: no `{missing[0]}`, so it is of an older version; measure again")
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


def scaling(folder: Path, link: str) -> str:
    report = load(folder, SCALING)
    return "\n".join([markdown.scaling(report), markdown.provenance(report), *plots(folder, link, ("scaling.png",))])


def plots(folder: Path, link: str, names: tuple[str, ...]) -> list[str]:
    return [f"![{Path(picture).stem}]({link}/{picture})\n" for picture in names if (folder / picture).exists()]


def page(folder: Path) -> str:
    """The folder's README: every case of its kernels.json."""
    report = load_kernels(folder)
    parts = ["# " + folder.name.replace("_", ", ") + "\n", "Generated by `python -m bench.readme`.\n"]
    parts += [markdown.provenance(report), *map(markdown.kernels_case, report["cases"])]
    parts += [losses.where_we_lose(report["cases"]), markdown.caveats(report["cases"]), "Singly:\n"]
    parts += ["\n".join(f"- {sentence}" for sentence in losses.sentences(report, name)) + "\n"]
    parts += ["\n".join(f"- not run: {line}" for line in report.get("not_run", [])) + "\n"]
    if (folder / SCALING).exists():
        parts.append(scaling(folder, "."))
    return "\n".join([*parts, *plots(folder, ".", PLOTS[:4])])


if __name__ == "__main__":
    sys.exit(main())
