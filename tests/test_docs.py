"""READMEs and docs/: generated pages are up to date, and the links, keys, commands and paths in them exist."""

import importlib.util
import re
import runpy
from pathlib import Path

import pytest
import typer

from mssr.cli import app
from mssr.config.schema import Config

ROOT = Path(__file__).parent.parent
CONFIG_PAGE = runpy.run_path(str(ROOT / "docs/config_page.py"))
PAGES = [
    ROOT / "README.md",
    ROOT / "kernels/README.md",
    ROOT / "examples/own_reward/README.md",
    ROOT / "tests/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
SECTIONS = [name for name, field in Config.model_fields.items() if hasattr(field.annotation, "model_fields")]
NO_KEYS = ("model.model", "model.lm_head", "rollout.generate", "rollout.update_weights")  # attributes and methods
EXAMPLES = {"configs/my.yaml"}  # paths of a reader's own files
FOLDERS = "mssr|kernels|bench|configs|docs|examples|tests"


def pages(test):
    return pytest.mark.parametrize("file", PAGES, ids=lambda file: str(file.relative_to(ROOT)))(test)


def found(pattern: str, file: Path, text: str | None = None) -> set[str]:
    """Return what matches in the file. text: of the file, without what is not ours, such as other trainers' keys."""
    return set(re.findall(pattern, file.read_text() if text is None else text))


def test_the_page_of_keys_is_what_the_schema_says():
    assert (ROOT / "docs/CONFIG.md").read_text() == CONFIG_PAGE["page"](), (
        "run python docs/config_page.py > docs/CONFIG.md"
    )


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 7000


@pages
def test_links_lead_somewhere(file):
    for link in found(r"\]\(([^)\s]+)\)", file):
        path, _, anchor = link.partition("#")
        if path.startswith("http"):
            continue
        target = file.parent / path if path else file
        assert target.exists(), f"{file.name}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), f"{file.name}: {link}"


def slug(heading: str) -> str:
    """Return GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pages
def test_keys_exist(file):
    known = {key for key, _, _ in CONFIG_PAGE["keys"](Config, "", None)} | {"train.budget", "train.optimizer"}
    text = re.sub(r"^\| .*? \|", "|", file.read_text(), flags=re.MULTILINE) if file.name == "MIGRATING.md" else None
    named = found(rf"(?<![\w/.])((?:{'|'.join(SECTIONS)})(?:\.[a-z_0-9]+)+)", file, text)
    unknown = {key for key in named - known if not key.startswith(NO_KEYS)}
    assert not unknown, f"{file.name}: {unknown}"


def test_keys_in_messages_and_docstrings_exist():
    """What an error tells a user to set, and the examples of docstrings and configs."""
    known = {key for key, _, _ in CONFIG_PAGE["keys"](Config, "", None)}
    keys = rf"(?<![\w/.])((?:{'|'.join(SECTIONS)})(?:\.[a-z_0-9]+)+)=(?!=)"
    files = [
        file for folder in FOLDERS.split("|") for file in (ROOT / folder).rglob("*") if file.suffix in (".py", ".yaml")
    ]
    named = {
        (str(file.relative_to(ROOT)), key) for file in files if "tests" not in file.parts for key in found(keys, file)
    }
    assert {("mssr/config/load.py", "train.optimizer.lr"), ("mssr/config/conflicts.py", "rollout.engine")} <= named
    assert not {(file, key) for file, key in named if key not in known}


@pages
def test_commands_and_modules_exist(file):
    commands = set(typer.main.get_command(app).commands)
    assert found(r"(?:^|bin/|-m |`)mssr (?!is\b|exact|sparse|recompute|forward|chunked)([a-z]+)\b", file) <= commands
    for module in found(r"python -m ([\w.]+)", file) - {"pytest"}:
        assert importlib.util.find_spec(module), f"{file.name}: python -m {module}"
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert found(r"(?:^|`)make ([a-z-]+)", file) <= targets


@pages
def test_paths_exist(file):
    for path in found(rf"[`\s]((?:{FOLDERS})/[\w./-]*\w/?)(?=[`\s,:;.)])", file) - EXAMPLES:
        assert (ROOT / path).exists(), f"{file.name}: {path}"
