"""Pictures of coloured shapes with questions such as "How many red squares are there?", in the formats that people have.

    FOLDER/train.jsonl, val.jsonl        columns of our own (picture, question, count, ...), pictures as files beside them
    FOLDER/train.parquet, val.parquet    the same columns, the pictures inside
    FOLDER/verl/, FOLDER/trl/            the same rows as verl and TRL expect them

`solution` is what the warm start imitates: often a guess, sometimes a list of what is in the picture, with a running count.
RL finds out which of the two pays.
"""

import argparse
import io
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from PIL import Image, ImageDraw

from mssr.cli import run_command
from mssr.config.paths import path_for
from mssr.errors import UserError

PICTURES = {"train": 300, "val": 60}
COLOURS = {"red": (220, 40, 40), "green": (40, 170, 70), "blue": (60, 100, 240)}
SHAPES = ("square", "circle")
CELL = 28  # pixels; a picture is two cells wide and high, and the model gets one image token per cell
EMPTY_SHARE = 0.15
FAVOURITE_SHARE = 0.35  # of the shapes are of one kind, so that counts above 1 are common
LOOK_SHARE = 0.4  # of the solutions; the others guess

SYSTEM_PROMPT = "Look at the picture. End with: Answer: N"


@dataclass(frozen=True)
class Shape:
    """box: left, top, right, bottom, in pixels of its cell."""

    colour: str
    kind: str
    box: tuple[int, int, int, int]


Picture = tuple[Shape | None, ...]  # the four cells, row by row


def write_shapes(folder: Path, *, seed: int = 0) -> list[Path]:
    """Write all files; return them. The same seed gives the same bytes.

    Raises:
        UserError: the folder holds files.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: already there; remove it, or name another folder")
    for name in ("pictures", "verl", "trl"):
        (folder / name).mkdir(parents=True)
    rng = random.Random(seed)
    drawn: set[Picture] = set()  # no held-out picture is among the training pictures
    written = []
    for split, count in PICTURES.items():
        rows = []
        for number in range(count):
            picture = _draw(rng, drawn)
            name = f"pictures/{split}_{number:03d}.png"
            (folder / name).write_bytes(_png(picture))
            rows += [{"picture": name, **row} for row in _questions(picture, rng)]
        pngs = {row["picture"]: (folder / row["picture"]).read_bytes() for row in rows}
        lines = folder / f"{split}.jsonl"
        lines.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        tables = {
            folder / f"{split}.parquet": [row | {"picture": _inside(row, pngs)} for row in rows],
            folder / "verl" / f"{split}.parquet": [_verl(row, pngs, split, n) for n, row in enumerate(rows)],
            folder / "trl" / f"{split}.parquet": [_trl(row, pngs) for row in rows],
        }
        for path, table in tables.items():
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path)
        written += [lines, *tables]
    return written


def _draw(rng: random.Random, drawn: set[Picture]) -> Picture:
    """Return a picture that is not in `drawn`, and add it."""
    while True:
        favourite = (rng.choice(list(COLOURS)), rng.choice(SHAPES))
        picture = tuple(_shape(rng, favourite) for _ in range(4))
        if picture not in drawn:
            drawn.add(picture)
            return picture


def _shape(rng: random.Random, favourite: tuple[str, str]) -> Shape | None:
    if rng.random() < EMPTY_SHARE:
        return None
    other = (rng.choice(list(COLOURS)), rng.choice(SHAPES))
    colour, kind = favourite if rng.random() < FAVOURITE_SHARE else other
    side = rng.randint(13, 21)
    left, top = (rng.randint(2, CELL - 3 - side) for _ in range(2))
    return Shape(colour, kind, (left, top, left + side, top + side))


def _png(picture: Picture) -> bytes:
    image = Image.new("RGB", (2 * CELL, 2 * CELL))
    draw = ImageDraw.Draw(image)
    for cell, shape in enumerate(picture):
        if shape:
            left, top = CELL * (cell % 2), CELL * (cell // 2)
            box = [place + corner for place, corner in zip(shape.box, (left, top, left, top))]
            (draw.rectangle if shape.kind == "square" else draw.ellipse)(box, fill=COLOURS[shape.colour])
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _questions(picture: Picture, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Yield a row for each kind of shape that is in the picture, and for one that is not."""
    kinds = [(colour, kind) for colour in (*COLOURS, None) for kind in (*SHAPES, None) if colour or kind]
    rng.shuffle(kinds)
    counts = {(colour, kind): _running_count(picture, colour, kind) for colour, kind in kinds}
    absent = next(asked for asked, count in counts.items() if not count[-1])
    for asked, count in counts.items():
        if count[-1] or asked == absent:
            words = " ".join(filter(None, (asked[0], f"{asked[1] or 'shape'}s")))
            yield {
                "question": f"How many {words} are there?",
                "count": count[-1],
                "solution": _solution(picture, count, look=rng.random() < LOOK_SHARE),
            }


def _running_count(picture: Picture, colour: str | None, kind: str | None) -> list[int]:
    """Return how many shapes of this colour and kind (None: any) are in the first cells, for each cell."""
    matches = [bool(s) and colour in (None, s.colour) and kind in (None, s.kind) for s in picture]
    return [sum(matches[: cell + 1]) for cell in range(len(picture))]


def _solution(picture: Picture, count: list[int], *, look: bool) -> str:
    answer = f"Answer: {count[-1]}"
    if not look:
        return answer
    names = [f"{shape.colour} {shape.kind}" if shape else "nothing" for shape in picture]
    return ", ".join(f"{name} {so_far}" for name, so_far in zip(names, count)) + f". {answer}"


def _inside(row: dict[str, Any], pngs: dict[str, bytes]) -> dict[str, Any]:
    return {"bytes": pngs[row["picture"]], "path": row["picture"]}


def _verl(row: dict[str, Any], pngs: dict[str, bytes], split: str, index: int) -> dict[str, Any]:
    return {
        "data_source": "shapes",
        "prompt": [
            {"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": f"<image>{row['question']}"},
        ],
        "images": [_inside(row, pngs)],
        "ability": "counting",
        "reward_model": {"style": "rule", "ground_truth": str(row["count"])},
        "extra_info": {"split": split, "index": index, "question": row["question"]},
    }


def _trl(row: dict[str, Any], pngs: dict[str, bytes]) -> dict[str, Any]:
    user = [{"type": "image", "text": None}, {"type": "text", "text": row["question"]}]
    return {
        "prompt": [
            {"role": "system", "content": [{"type": "text", "text": SYSTEM_PROMPT}]},
            {"role": "user", "content": user},
        ],
        "images": [_inside(row, pngs)],
        "answer": str(row["count"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Write pictures of coloured shapes and questions about them.")
    parser.add_argument("folder", type=path_for("folder"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for path in write_shapes(arguments.folder, seed=arguments.seed):
        print(path)


if __name__ == "__main__":
    run_command(main)
