"""The demo's problems: two handwritten digits side by side, and a question about them.

The digits are the 1,797 real 8x8 scans that come inside scikit-learn. Which scans are for training, validation and
testing never changes, whatever the seed, so no seed trains on another one's test digits.
"""

import io
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow
import pyarrow.parquet
from datasets import Features, Image, List, Value
from PIL import Image as PILImage
from sklearn.datasets import load_digits

from mssr.errors import UserError

DIGIT_SIDE = 56  # pixels; two merged patches of a 14-pixel vision tower each way
SPLIT_SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}  # of the scans of every digit
SPLIT_SEED = 0

# kind -> wordings, answer
QUESTIONS: dict[str, tuple[tuple[str, ...], Callable[[int, int], int]]] = {
    "sum": (("What is the sum of the two digits?", "Add the two digits."), lambda a, b: a + b),
    "difference": (
        ("What is the difference of the two digits?", "Subtract the smaller digit from the larger."),
        lambda a, b: abs(a - b),
    ),
    "larger": (("Which digit is larger?", "What is the larger of the two digits?"), max),
}

FEATURES = Features(
    {"images": List(Image()), "problem": Value("string"), "answer": Value("string"), "solution": Value("string")}
)


def write_digits(
    out_dir: str | Path,
    *,
    seed: int = 0,
    train: int = 2048,
    val: int = 512,
    test: int = 512,
    format: Literal["parquet", "jsonl"] = "parquet",
) -> dict[str, Path]:
    """Writes train, val and test problems of disjoint scans; returns their files. Same seed, same bytes.

    parquet holds the images; JSON lines have them as PNG files in a folder beside it.

    Raises:
        UserError: more problems are asked for than the scans give.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    digits = load_digits()
    scans = split_scans(digits.target)
    write = {"parquet": _write_parquet, "jsonl": _write_jsonl}[format]
    paths = {}
    for split, count in {"train": train, "val": val, "test": test}.items():
        paths[split] = out_dir / f"{split}.{format}"
        rng = random.Random(f"{seed}/{split}")
        problems = list(_problems(scans[split], digits.target, count, rng, split))
        write(paths[split], [_row(problem, digits.images) for problem in problems])
    return paths


def split_scans(labels: np.ndarray) -> dict[str, list[int]]:
    """Indices of the scans of each split: disjoint, every digit in the same shares, always the same."""
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
    scans: list[int], labels: np.ndarray, count: int, rng: random.Random, split: str
) -> Iterator[tuple[int, int, str, int, int, int]]:
    """`count` different (left scan, right scan, wording, left digit, right digit, answer)."""
    available = len(scans) * (len(scans) - 1) * len(QUESTIONS)
    if count > available // 2:  # drawing until new ones turn up stays quick
        raise UserError(f"digits: {split}={count} is more than the {available // 2} problems its scans give")
    drawn = set()
    while len(drawn) < count:
        left, right = rng.sample(scans, 2)
        kind = rng.choice(list(QUESTIONS))
        if (left, right, kind) in drawn:
            continue
        drawn.add((left, right, kind))
        wordings, answer = QUESTIONS[kind]
        a, b = int(labels[left]), int(labels[right])
        yield left, right, rng.choice(wordings), a, b, answer(a, b)


def _row(problem: tuple[int, int, str, int, int, int], scans: np.ndarray) -> dict[str, Any]:
    left, right, wording, a, b, answer = problem
    return {
        "images": [{"bytes": _picture(scans[left], scans[right]), "path": f"{left:04d}_{right:04d}.png"}],
        "problem": f"<image>{wording}",
        "answer": str(answer),
        "solution": f"<think>{a} {b}</think>\\boxed{{{answer}}}",
    }


def _picture(left: np.ndarray, right: np.ndarray) -> bytes:
    """PNG of two scans ([8, 8], values 0..16) side by side, light on dark as they were scanned."""
    pair = PILImage.new("RGB", (2 * DIGIT_SIDE, DIGIT_SIDE))
    for number, scan in enumerate((left, right)):
        small = PILImage.fromarray((scan * (255 / 16)).astype(np.uint8))
        pair.paste(small.resize((DIGIT_SIDE, DIGIT_SIDE), PILImage.Resampling.BICUBIC), (number * DIGIT_SIDE, 0))
    buffer = io.BytesIO()
    pair.save(buffer, format="PNG")
    return buffer.getvalue()


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=FEATURES.arrow_schema), path)


def _write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    folder = path.with_suffix("")
    folder.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            (image,) = row["images"]
            (folder / image["path"]).write_bytes(image["bytes"])
            file.write(json.dumps(row | {"images": [f"{folder.name}/{image['path']}"]}) + "\n")
