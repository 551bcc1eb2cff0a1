"""Read `faults/*.toml`: small mistakes, each a replacement of text in one source file."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TABLE = HERE / "README.md"


@dataclass(frozen=True)
class Fault:
    name: str
    fault: str  # one line: what is wrong
    file: str  # relative to the checkout, like the tests
    old: str  # occurs once in the file
    new: str
    tests: tuple[str, ...]  # test files that must notice it, the likeliest first
    group: str

    def applied(self, root: Path) -> str:
        """Return the text of the file with the fault in it.

        Raises:
            ValueError: the text to replace does not occur exactly once.
        """
        text = (root / self.file).read_text()
        if (count := text.count(self.old)) != 1:
            raise ValueError(
                f"{self.name}: {self.file} has the text to replace {count} times; adapt faults/{self.group}.toml"
            )
        return text.replace(self.old, self.new)


def all_faults() -> dict[str, Fault]:
    """Return the faults by name, in the order of the files.

    Raises:
        ValueError: two faults have the same name.
    """
    faults: dict[str, Fault] = {}
    for file in sorted((HERE / "faults").glob("*.toml")):
        for entry in tomllib.loads(file.read_text())["mutant"]:
            fault = Fault(**entry | {"tests": tuple(entry["tests"])}, group=file.stem)
            if fault.name in faults:
                raise ValueError(f"{fault.name} is in {faults[fault.name].group}.toml and in {file.name}")
            faults[fault.name] = fault
    return faults


def table() -> dict[str, str]:
    """Return the rows of the table of results, tests/mutants/README.md, by fault."""
    lines = TABLE.read_text().splitlines() if TABLE.is_file() else []
    rows = [line for line in lines if line.startswith("| ") and not line.startswith("| mutant |")]
    return {row.split(" | ")[0].removeprefix("| "): row for row in rows}


def escaped(text: str) -> str:
    """Return the text escaped for a cell of the table."""
    return text.replace("|", "\\|")
