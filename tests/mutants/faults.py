"""The table of faults: small mistakes, each a replacement of text in one source file, by the file that lists them."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@dataclass(frozen=True)
class Fault:
    name: str
    fault: str  # one line: what is wrong with it
    file: str  # relative to the checkout, like the tests
    old: str  # occurs once in the file
    new: str
    tests: tuple[str, ...]  # files whose tests must notice, the likeliest first
    group: str

    def applied(self, root: Path) -> str:
        """The file's text with the fault.

        Raises:
            ValueError: the text to be replaced is not there, or more than once.
        """
        text = (root / self.file).read_text()
        if (count := text.count(self.old)) != 1:
            raise ValueError(
                f"{self.name}: {self.file} has the text to replace {count} times; adapt faults/{self.group}.toml"
            )
        return text.replace(self.old, self.new)


def all_faults() -> dict[str, Fault]:
    """By name, in the order of the files.

    Raises:
        ValueError: a name is there twice.
    """
    faults: dict[str, Fault] = {}
    for file in sorted((HERE / "faults").glob("*.toml")):
        for entry in tomllib.loads(file.read_text())["mutant"]:
            fault = Fault(**entry | {"tests": tuple(entry["tests"])}, group=file.stem)
            if fault.name in faults:
                raise ValueError(f"{fault.name} is in {faults[fault.name].group}.toml and in {file.name}")
            faults[fault.name] = fault
    return faults
