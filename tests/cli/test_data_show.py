"""`mssr data show`: rows as the model will get them."""

import io
import json

import pytest
from PIL import Image
from transformers import AutoImageProcessor

from mssr.data.show import show
from mssr.errors import UserError


@pytest.fixture(scope="module")
def config(material):
    """Return a configuration whose model has no weights."""
    folder = material / "without_weights"
    folder.mkdir()
    for file in (material / "untrained").iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    text = (material / "config.yaml").read_text().replace(str(material / "untrained"), str(folder))
    (material / "show.yaml").write_text(text)
    return material / "show.yaml"


@pytest.fixture
def rows(tmp_path):
    """Return a verl file of three rows: two pictures, a broken one, text."""
    files = {}
    for name, size in (("small", (20, 40)), ("large", (300, 200))):
        buffer = io.BytesIO()
        Image.new("RGB", size, "red").save(buffer, "PNG")
        (tmp_path / f"{name}.png").write_bytes(buffer.getvalue())
        files[name] = f"{name}.png"
    (tmp_path / "bad.png").write_bytes(b"nothing")

    def row(text, *images):
        return {
            "prompt": [{"role": "system", "content": "Look."}, {"role": "user", "content": text}],
            "images": list(images),
            "reward_model": {"style": "rule", "ground_truth": "4"},
            "extra_info": {"index": 7, "long": "x" * 500},
        }

    lines = [row("Is <image> in <image>?", "small.png", "large.png"), row("<image>?", "bad.png"), row("2 + 2?")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "rows.jsonl"


def test_what_the_model_gets(mssr, material, config, rows):
    ended = mssr("data", "show", config, f"data.train={rows}", "data.val=null", "data.instruction=Box it.")
    assert ended.code == 1 and ended.err == ""
    first, second, third = ended.out.split("\n\n")
    processor = AutoImageProcessor.from_pretrained(material / "untrained", backend="pil")
    limits = {"shortest_edge": 3136, "longest_edge": 12544}
    pictures = [Image.open(rows.parent / name) for name in ("small.png", "large.png")]
    grid = processor(pictures, size=limits, return_tensors="pt")["image_grid_thw"]
    (small, large), patch = (grid.prod(1) // 4).tolist(), processor.patch_size
    (_, high, wide), (_, higher, wider) = (grid * patch).tolist()
    chat = [
        f"<|im_start|>system\nLook.<|im_end|>\n<|im_start|>user\nIs <|image_pad|> x {small}",
        f" in <|image_pad|> x {large}",
        "?\nBox it.<|im_end|>\n<|im_start|>assistant\n",
    ]
    shown = first.replace("<|vision_start|>", "").replace("<|vision_end|>", "")
    head, _, prompt = shown.partition("\nprompt\n")
    assert "\n".join(line.removeprefix("  | ") for line in prompt.split("\n")) == "".join(chat)
    lines = head.split("\n")
    assert lines[0] == f"data.train: {rows}, row 0"
    assert lines[1].endswith(f", {small + large} of images")
    assert lines[2] == f"image 1     20 x 40 pixels in the file, {wide} x {high} for the model: {small} tokens"
    assert lines[3] == f"image 2     300 x 200 pixels in the file, {wider} x {higher} for the model: {large} tokens"
    assert lines[4:6] == ["answer      4", 'reward_model {"style": "rule", "ground_truth": "4"}']
    assert lines[6].startswith('extra_info  {"index": 7, "long": "xxx') and lines[6].endswith("characters)")
    assert second.startswith(f"mssr: {rows}, row 1: image 1 of 1 ({rows.parent}/bad.png) is unreadable: ")
    assert third.startswith(f"data.train: {rows}, row 2\ntokens ") and "of images" not in third


def test_one_row_of_every_file(mssr, config, material):
    train, val = (material / "data" / f"{split}.parquet" for split in ("train", "val"))
    ended = mssr("data", "show", config, "--row", "30").check()
    heads = [line for line in ended.out.splitlines() if line.startswith("data.")]
    assert heads == [f"data.train: {train}, row 30", f"data.val: {val}, row 30"]
    assert mssr("data", "show", config, "--row", "64").line == "--row 64: no source has so many rows"


def test_the_columns_are_checked(mssr, config, rows):
    line = mssr("data", "show", config, "data.columns.answer=anwser").line
    assert line.startswith("data.columns.answer: ") and line.endswith("; did you mean answer?")


def test_a_wrong_name_is_said_before_the_rows_that_lack_it(load, material, tmp_path):
    """JSON lines may have a column from a later row on, so that only their end tells whether it is there."""
    lines = [json.dumps({"question": "1 + 1?", "result": 2})] * 3
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    columns = f"data.columns={{{tmp_path / 'a.jsonl'}: {{answer: reslt}}}}"
    config = load(f"data.train={tmp_path / 'a.jsonl'}", columns, text=(material / "config.yaml").read_text())
    with pytest.raises(UserError, match=r"^data\.columns\.answer: .* no column `reslt` .*; did you mean result\?$"):
        next(show(config, 1))
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, json.dumps({"reslt": 2})]))
    assert next(show(config, 1)).endswith("row 0: `answer` is missing or empty; fill it in or remove the row")
