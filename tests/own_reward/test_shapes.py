"""The shapes of examples/own_reward: pictures show what is asked, and every format holds the same prompts."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from examples.own_reward.shapes import PICTURES, SYSTEM_PROMPT, main, write_shapes
from examples.tiny.model import train_tokenizer
from mssr.config.data_keys import DataConfig
from mssr.data.dataset import ProblemDataset
from mssr.data.prompts import PromptEncoder
from mssr.errors import UserError

CONFIG = Path(__file__).parents[2] / "examples/own_reward/config.yaml"
COLOURS = ("red", "green", "blue")  # by the brightest channel


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own_reward") / "shapes"
    write_shapes(folder)
    return folder


def rows_of(folder, split):
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def cells(picture):
    """Return colour and kind of what each 28 x 28 cell shows, or None: a square fills its box, a circle does not."""
    found = []
    for top in (0, 28):
        for left in (0, 28):
            cell = picture.crop((left, top, left + 28, top + 28))
            box = cell.getbbox()
            if box is None:
                found.append(None)
                continue
            pixels = np.asarray(cell.crop(box))
            filled = pixels.any(-1).mean()
            colour = COLOURS[pixels.sum((0, 1)).argmax()]
            found.append((colour, "square" if filled == 1 else "circle"))
            assert filled == 1 or 0.7 < filled < 0.9
    return found


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_pictures_show_what_is_counted(folder, split):
    rows = rows_of(folder, split)
    shown = {}
    for path in (folder / "pictures").glob(f"{split}_*"):
        with Image.open(path) as picture:
            shown[f"pictures/{path.name}"] = cells(picture)
    assert len(shown) == PICTURES[split] and {row["picture"] for row in rows} == shown.keys()
    looks = 0
    for row in rows:
        colour, kind = re.fullmatch(r"How many (?:(\w+) )?(\w+)s are there\?", row["question"]).groups()
        counts, names = [0], []
        for cell in shown[row["picture"]]:
            matches = cell and colour in (None, cell[0]) and kind in ("shape", cell[1])
            counts.append(counts[-1] + bool(matches))
            names.append(" ".join(cell) if cell else "nothing")
        assert row["count"] == counts[-1], row
        look = ", ".join(f"{name} {count}" for name, count in zip(names, counts[1:]))
        assert row["solution"] in (f"Answer: {row['count']}", f"{look}. Answer: {row['count']}")
        looks += row["solution"] != f"Answer: {row['count']}"
    assert 0.3 < looks / len(rows) < 0.5


def test_held_out_pictures_are_new(folder):
    pictures = [path.read_bytes() for path in (folder / "pictures").iterdir()]
    assert len(set(pictures)) == len(pictures) == sum(PICTURES.values())


def test_the_same_seed_gives_the_same_bytes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["shapes", str(tmp_path / "again")])
    main()
    write_shapes(tmp_path / "other", seed=1)
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    assert len(files) == 8 + sum(PICTURES.values())
    for file in files:
        there = (folder / file).read_bytes()
        assert (tmp_path / "again" / file).read_bytes() == there != (tmp_path / "other" / file).read_bytes()


def test_a_folder_that_is_there_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="already there; remove it, or name another folder"):
        write_shapes(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.fixture(scope="module")
def encoder_of():
    tokenizer = train_tokenizer(["a red square"], 300)

    def encoder(options):
        return PromptEncoder(tokenizer, Qwen2VLImageProcessorPil(), options)

    return encoder


@pytest.mark.parametrize("file", ["val.parquet", "verl/val.parquet", "trl/val.parquet"])
def test_every_format_gives_the_same_prompts(folder, encoder_of, file):
    data = yaml.safe_load(CONFIG.read_text())["data"] | {"max_prompt_tokens": 256}  # the tokenizer has few merges
    own = DataConfig(**data)
    theirs = own if file == "val.parquet" else own.model_copy(update={"columns": {}, "system_prompt": None})
    ours, other = (
        ProblemDataset(str(folder / name), encoder_of(options), options)
        for name, options in (("val.jsonl", own), (file, theirs))
    )
    assert len(ours) == len(other) == len(rows_of(folder, "val"))
    for number in range(0, len(ours), 7):
        mine, yours = ours[number], other[number]
        assert mine.token_ids.tolist() == yours.token_ids.tolist()
        assert (mine.images, mine.answer, mine.rendered) == (yours.images, yours.answer, yours.rendered)
        assert mine.pixel_values.equal(yours.pixel_values) and mine.image_grid_thw.tolist() == [[1, 4, 4]]
    with Image.open(io.BytesIO(mine.images[0])) as picture:
        assert picture.size == (56, 56)
    question = rows_of(folder, "val")[number]["question"]
    assert mine.rendered == (
        f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
        f"{question}<|im_end|>\n<|im_start|>assistant\n"
    )
    if file == "val.parquet":
        assert ours.fingerprint == other.fingerprint and ours.solutions_fingerprint == other.solutions_fingerprint
    if file == "verl/val.parquet":
        assert yours.columns["data_source"] == "shapes" and yours.columns["extra_info"]["index"] == number
