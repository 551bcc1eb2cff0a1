"""Images of handwritten digits side by side, with a question: two digits for the demo, more for a harder task.

For two digits the question asks for the sum, the difference or the larger one. For more it asks for a chain of these
operations, one digit after the other; the solution lists the digits, then each intermediate result. Each further digit is
one more to read and one more step to compute.

The digits are the 1,797 real 8x8 scans in scikit-learn. The split of scans into training, validation and test does not
depend on the seed, so no seed trains on the test digits of another.
"""

import argparse
import io
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow
import pyarrow.parquet
from datasets import Features, Image, List, Value
from PIL import Image as PILImage
from sklearn.datasets import load_digits

from mssr.cli import run_command
from mssr.config.paths import path_for
from mssr.errors import UserError

DIGIT_SIDE = 56  # pixels; two merged patches of a 14-pixel vision tower each way
SPLIT_SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}  # of the scans of every digit
SPLIT_SEED = 0

OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "sum": lambda a, b: a + b,
    "difference": lambda a, b: abs(a - b),
    "larger": max,
}
QUESTIONS = {  # for two digits: operation -> wordings
    "sum": ("What is the sum of the two digits?", "Add the two digits."),
    "difference": ("What is the difference of the two digits?", "Subtract the smaller digit from the larger."),
    "larger": ("Which digit is larger?", "What is the larger of the two digits?"),
}
CHAIN = {  # for more digits: operation -> wording as the first of a chain, as a later one
    "sum": ("Add the first two digits", "add the {}"),
    "difference": ("Take the difference of the first two digits", "the difference of that and the {}"),
    "larger": ("Take the larger of the first two digits", "the larger of that and the {}"),
}
ORDINALS = ("third", "fourth", "fifth", "sixth")
MOST_DIGITS = 2 + len(ORDINALS)

FEATURES = Features(
    {"images": List(Image()), "problem": Value("string"), "answer": Value("string"), "solution": Value("string")}
)


@dataclass(frozen=True)
class Problem:
    """scans: indices of the scans, from the left. digits: their values. results: of each operation in turn."""

    scans: tuple[int, ...]
    question: str
    digits: tuple[int, ...]
    results: tuple[int, ...]


def write_digits(
    out_dir: str | Path,
    *,
    seed: int = 0,
    train: int = 2048,
    val: int = 512,
    test: int = 512,
    digits: int = 2,
    format: Literal["parquet", "jsonl"] = "parquet",
) -> dict[str, Path]:
    """Write train, val and test problems of disjoint scans; return their files. The same seed gives the same bytes.

    digits: per image, 2 to 6; the question chains digits - 1 operations.
    format: parquet includes the images; jsonl has them as PNG files in a folder beside it.

    Raises:
        UserError: more problems than the scans allow, a number of digits out of range, or such files are there.
    """
    if not 2 <= digits <= MOST_DIGITS:
        raise UserError(f"digits: digits={digits}: an image shows 2 to {MOST_DIGITS} digits")
    out_dir = Path(out_dir)
    for split in SPLIT_SHARES:
        for there in (out_dir / f"{split}.{format}", out_dir / split):  # jsonl has images in the folder
            if there.exists():
                raise UserError(f"{there}: already there; name another folder")
    out_dir.mkdir(parents=True, exist_ok=True)
    source = load_digits()
    scans = split_scans(source.target)
    write = {"parquet": _write_parquet, "jsonl": _write_jsonl}[format]
    paths = {}
    for split, count in {"train": train, "val": val, "test": test}.items():
        paths[split] = out_dir / f"{split}.{format}"
        rng = random.Random(f"{seed}/{split}")
        problems = list(_problems(scans[split], source.target, digits, count, rng, split))
        write(paths[split], [_row(problem, source.images) for problem in problems])
    return paths


def split_scans(labels: np.ndarray) -> dict[str, list[int]]:
    """Return the indices of each split's scans: disjoint, stratified by digit, always the same."""
    rng = random.Random(SPLIT_SEED)
    splits: dict[str, list[int]] = {split: [] for split in SPLIT_SHARES}
    for digit in range(10):
        scans = np.flatnonzero(labels == digit).tolist()
        rng.shuffle(scans)
        start = 0
        for split, share in SPLIT_SHARES.items():
            end = len(scans) if split == "test" else start + round(share * len(scans))
            splits[split] += scans[start:end]
            start = end
    return splits


def _problems(
    scans: list[int], labels: np.ndarray, digits: int, count: int, rng: random.Random, split: str
) -> Iterator[Problem]:
    """Yield `count` problems; no two have the same scans in the same order and the same operations."""
    available = math.perm(len(scans), digits) * len(OPERATIONS) ** (digits - 1)
    if count > available // 2:  # so that rejection sampling stays fast
        raise UserError(f"digits: {split}={count} is more than the {available // 2} problems that its scans allow")
    drawn = set()
    while len(drawn) < count:
        shown = tuple(rng.sample(scans, digits))
        operations = tuple(rng.choice(list(OPERATIONS)) for _ in range(digits - 1))
        if (shown, operations) in drawn:
            continue
        drawn.add((shown, operations))
        values = tuple(int(labels[scan]) for scan in shown)
        yield Problem(shown, _question(operations, rng), values, _results(values, operations))


def _question(operations: tuple[str, ...], rng: random.Random) -> str:
    if len(operations) == 1:
        return rng.choice(QUESTIONS[operations[0]])
    first, *others = operations
    steps = [CHAIN[operation][1].format(nth) for operation, nth in zip(others, ORDINALS)]
    return ", then ".join([CHAIN[first][0], *steps]) + "."


def _results(digits: tuple[int, ...], operations: tuple[str, ...]) -> tuple[int, ...]:
    """Apply each operation to the previous result and the next digit."""
    operation = iter(operations)
    return tuple(accumulate(digits, lambda value, digit: OPERATIONS[next(operation)](value, digit)))[1:]


def _row(problem: Problem, scans: np.ndarray) -> dict[str, Any]:
    *on_the_way, answer = problem.results
    thoughts = " ".join(str(number) for number in (*problem.digits, *on_the_way))
    name = "_".join(f"{scan:04d}" for scan in problem.scans)
    return {
        "images": [{"bytes": _picture([scans[scan] for scan in problem.scans]), "path": f"{name}.png"}],
        "problem": f"<image>{problem.question}",
        "answer": str(answer),
        "solution": f"<think>{thoughts}</think>\\boxed{{{answer}}}",
    }


def _picture(scans: list[np.ndarray]) -> bytes:
    """Return a PNG of scans ([8, 8], values 0..16) side by side, light on dark."""
    row = PILImage.new("RGB", (len(scans) * DIGIT_SIDE, DIGIT_SIDE))
    for number, scan in enumerate(scans):
        small = PILImage.fromarray((scan * (255 / 16)).astype(np.uint8))
        row.paste(small.resize((DIGIT_SIDE, DIGIT_SIDE), PILImage.Resampling.BICUBIC), (number * DIGIT_SIDE, 0))
    buffer = io.BytesIO()
    row.save(buffer, format="PNG")
    return buffer.getvalue()


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=FEATURES.arrow_schema), path)


def _write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    folder = path.with_suffix("")
    folder.mkdir()
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            (image,) = row["images"]
            (folder / image["path"]).write_bytes(image["bytes"])
            file.write(json.dumps(row | {"images": [f"{folder.name}/{image['path']}"]}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write handwritten digits as problems: train, val and test files.")
    parser.add_argument("out", type=path_for("out"), help="folder for train, val and test")
    parser.add_argument("--seed", type=int, default=0)
    for split, count in (("train", 2048), ("val", 512), ("test", 512)):
        parser.add_argument(f"--{split}", type=int, default=count, help=f"problems (default {count})")
    parser.add_argument("--digits", type=int, default=2, help="digits per image; 3 and more: a chain of operations")
    parser.add_argument("--format", choices=("parquet", "jsonl"), default="parquet")
    settings = vars(parser.parse_args())
    for split, path in write_digits(settings.pop("out"), **settings).items():
        print(f"{split:5} {path}")


if __name__ == "__main__":
    run_command(main)
