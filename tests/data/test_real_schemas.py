"""Files with the Arrow schemas of public datasets, written by the `datasets` library, load unchanged."""

import io
import json
import os
import struct
import zlib

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from datasets import Features, Image, List, Value
from PIL import Image as Pillow

from mssr.data import dataset as dataset_module
from mssr.data.files import open_rows
from mssr.errors import UserError

GEOMETRY3K = Features({"images": List(Image()), "problem": Value("string"), "answer": Value("string")})
MMK12 = Features(
    {
        "id": Value("string"),
        "question": Value("string"),
        "answer": Value("string"),
        "subject": Value("string"),
        "image": Image(),
    }
)
SCHEMAS = {"geometry3k": GEOMETRY3K, "vision_r1": GEOMETRY3K, "mmk12": MMK12}


@pytest.fixture
def problems(png):
    """Return (question, answer, images) per row: one image with or without a marker, two images, no image."""
    return [
        ("<image>Find x. Round to the nearest tenth.", "48", [png(60, 40, seed=0)]),
        ("Is the area of the figure 3?", "\\frac{1}{2}", [png(33, 90, seed=1)]),
        ("<image>What comes after <image>?", "7.5", [png(56, 56, seed=2), png(84, 28, seed=3)]),
        ("What is 1 + 1?", "2", []),
        ("<image>Find y.", "x^2 - 1", [png(40, 40, seed=4)]),
    ]


def rows_of(schema: str, problems) -> list[dict]:
    if schema != "mmk12":
        return [
            {"images": [{"bytes": image, "path": None} for image in images], "problem": text, "answer": answer}
            for text, answer, images in problems
        ]
    return [
        {
            "id": f"test_{number}",
            "question": text,
            "answer": answer,
            "subject": "math",
            "image": {"bytes": images[0], "path": f"{number}.png"} if images else None,
        }
        for number, (text, answer, images) in enumerate(problems)
        if len(images) < 2
    ]


def write(file, schema: str, rows: list[dict]):
    file.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows, features=SCHEMAS[schema]).to_parquet(file)
    return file


def assert_prompts_are_the_rows(problems, file, image_processor):
    """Compare with an oracle: rows decoded by `datasets`, their images encoded by the plain processor."""
    expected = datasets.Dataset.from_parquet(str(file), cache_dir=str(file.parent / "cache"))
    assert len(problems) == len(expected)
    for prompt, row in zip(problems, expected):
        assert prompt.problem == row.get("problem", row.get("question")) and prompt.answer == row["answer"]
        pictures = row["images"] if "images" in row else [row["image"]] if row["image"] else []
        assert len(prompt.images) == len(pictures)
        if not pictures:
            assert prompt.pixel_values is None
            continue
        size = {"shortest_edge": 784, "longest_edge": 100_352}
        plain = image_processor([picture.convert("RGB") for picture in pictures], size=size, return_tensors="pt")
        assert torch.equal(prompt.pixel_values, plain["pixel_values"])
        assert torch.equal(prompt.image_grid_thw, plain["image_grid_thw"])


@pytest.mark.parametrize("schema", SCHEMAS)
def test_a_file(make_dataset, problems, image_processor, tmp_path, schema):
    file = write(tmp_path / "train.parquet", schema, rows_of(schema, problems))
    assert_prompts_are_the_rows(make_dataset(file), file, image_processor)


@pytest.mark.parametrize(
    "schema, names",
    [
        ("geometry3k", ["data/train-00000-of-00001", "data/validation-00000-of-00001", "data/test-00000-of-00001"]),
        ("vision_r1", ["train", "test"]),
        ("mmk12", ["data/train-00000-of-00001", "data/test-00000-of-00001"]),
        ("vision_r1", ["default/train/0000", "default/test/0000"]),  # the hub's automatic conversion
    ],
)
def test_a_clone_of_the_repository(make_dataset, problems, tmp_path, schema, names):
    rows = rows_of(schema, problems)
    for number, name in enumerate(names):
        write(tmp_path / f"{name}.parquet", schema, rows[: 1 + number])
    (tmp_path / "README.md").write_text("---\n")
    with pytest.raises(UserError, match=f"holds several splits .*; name one, for example {tmp_path}:train"):
        make_dataset(tmp_path)
    assert len(make_dataset(f"{tmp_path}:train")) == 1
    assert len(make_dataset(f"{tmp_path}:test")) == len(names)
    if len(names) == 3:
        assert len(make_dataset(f"{tmp_path}:val")) == len(make_dataset(f"{tmp_path}:validation")) == 2


def test_the_hub_cache_of_files(make_dataset, problems, tmp_path):
    """The layout of `huggingface-cli download`: links to blobs, one folder per version, `refs/main` names the last."""
    folder = tmp_path / "datasets--someone--problems"
    for version, count in (("aaaa", 4), ("bbbb", 3)):
        blob = write(folder / "blobs" / f"blob_{version}", "mmk12", rows_of("mmk12", problems)[:count])
        link = folder / "snapshots" / version / "data" / "train-00000-of-00001.parquet"
        link.parent.mkdir(parents=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("bbbb")
    assert len(make_dataset(folder)) == 3
    assert len(make_dataset(f"{folder}:train")) == 3
    assert len(make_dataset(folder / "snapshots" / "aaaa")) == 4


@pytest.mark.parametrize("schema", ["geometry3k", "mmk12"])
def test_a_hub_name_in_the_cache_of_datasets(make_dataset, problems, image_processor, tmp_path, monkeypatch, schema):
    """Loads offline, with the real library, from the cache of an earlier `load_dataset`."""
    file = write(tmp_path / "train.parquet", schema, rows_of(schema, problems))
    built = datasets.load_dataset("parquet", data_files={"train": str(file)}, cache_dir=str(tmp_path / "built"))
    from_there = next((tmp_path / "built").rglob("dataset_info.json")).parent
    place = tmp_path / "cache" / "someone___problems" / "default" / "0.0.0"
    place.mkdir(parents=True)
    from_there.rename(place / "0123456789abcdef0123456789abcdef01234567")
    for arrow in place.rglob("parquet-*.arrow"):
        arrow.rename(arrow.with_name(arrow.name.replace("parquet-", "problems-")))
    del built
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert_prompts_are_the_rows(make_dataset("someone/problems:train"), file, image_processor)
    with pytest.raises(UserError, match="^someone/problems:test: neither a local file nor a hub dataset: "):
        make_dataset("someone/problems:test")


def test_every_arrow_type_a_column_may_have(make_dataset, problems, tmp_path):
    """The same rows with the column types that pandas, polars and hand-written scripts write."""
    text = pyarrow.array([text for text, _, _ in problems])
    answer = pyarrow.array([answer for _, answer, _ in problems])
    images = [images for _, _, images in problems]
    paths = []
    for number, row in enumerate(images):
        paths.append([f"pictures/{number}_{place}.png" for place in range(len(row))])
        for name, image in zip(paths[-1], row):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(image)
    as_structs = [[{"bytes": image, "path": None} for image in row] for row in images]
    path_structs = [[{"bytes": None, "path": name} for name in row] for row in paths]
    columns = {
        "structs": (text, answer, pyarrow.array(as_structs)),
        "paths in structs": (text, answer, pyarrow.array(path_structs)),
        "bytes": (text, answer, pyarrow.array(images, pyarrow.list_(pyarrow.binary()))),
        "paths": (text, answer, pyarrow.array(paths)),
        "null for none": (text, answer, pyarrow.array([row or None for row in as_structs])),
        "large": (
            text.cast(pyarrow.large_string()),
            answer.cast(pyarrow.large_string()),
            pyarrow.array(images, pyarrow.large_list(pyarrow.large_binary())),
        ),
        "views": (text.cast(pyarrow.string_view()), answer.cast(pyarrow.string_view()), pyarrow.array(images)),
        "categories": (text.dictionary_encode(), answer.dictionary_encode(), pyarrow.array(as_structs)),
    }
    loaded = {}
    for name, arrays in columns.items():
        file = tmp_path / f"{name}.parquet"
        table = pyarrow.table(dict(zip(("problem", "answer", "images"), arrays)) | {"extra": [{"a": [1]}] * 5})
        pyarrow.parquet.write_table(table.select(["extra", "images", "answer", "problem"]), file)
        loaded[name] = make_dataset(file).fingerprint
    assert set(loaded.values()) == {loaded["structs"]}, loaded


def test_single_images_of_every_arrow_type(make_dataset, problems, png, tmp_path):
    one = [row for row in problems if len(row[2]) == 1]
    (tmp_path / "p").mkdir()
    for number, (_, _, images) in enumerate(one):
        (tmp_path / "p" / f"{number}.png").write_bytes(images[0])
    columns = {
        "struct": [{"bytes": images[0], "path": "x.png"} for _, _, images in one],
        "bytes": [images[0] for _, _, images in one],
        "path": [f"p/{number}.png" for number in range(len(one))],
    }
    prints = set()
    for name, images in columns.items():
        table = pyarrow.table({"image": images, "question": [r[0] for r in one], "answer": [r[1] for r in one]})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
        prints.add(make_dataset(tmp_path / f"{name}.parquet").fingerprint)
    assert len(prints) == 1


def test_a_row_group_is_read_in_parts(tmp_path):
    rows = [{"images": [{"bytes": bytes([n % 256])}], "problem": f"{n}?", "answer": str(n)} for n in range(600)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=600)
    assert list(open_rows(str(tmp_path / "a.parquet"))) == rows


def damaged(png) -> dict[str, tuple[bytes | None, str]]:
    """Return invalid images by name, each with a part of its error message."""
    bomb = io.BytesIO()
    Pillow.new("1", (20_000, 10_000)).save(bomb, format="PNG")
    large = io.BytesIO()
    Pillow.new("1", (10_000, 9_000)).save(large, format="PNG")
    return {
        "corrupt": (png()[:60] + b"\xff" * 400 + png()[460:], " is unreadable: "),
        "truncated": (png(200, 200)[:3000], " is unreadable: image file is truncated"),
        "no image": (b"<html>not found</html>", " is unreadable: cannot identify image file; "),
        "empty": (b"", " is unreadable: is empty; "),
        "no pixels": (empty_png(), " is unreadable: cannot identify image file; "),
        "bomb": (bomb.getvalue(), " is unreadable: Image size (200000000 pixels) exceeds limit"),
        "large": (large.getvalue(), " is unreadable: 10000 x 9000 pixels, more than 89478485; "),
        "extreme": (png(600, 2), "aspect ratio must be smaller than 200"),
    }


def empty_png() -> bytes:
    """Return a PNG of 0 x 5 pixels."""
    out = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", struct.pack(">IIBBBBB", 0, 5, 8, 2, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b"")):
        out += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return out


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("schema", ["geometry3k", "mmk12"])
def test_damaged_images_are_named_by_their_row(make_dataset, png, tmp_path, schema, monkeypatch):
    monkeypatch.setattr(dataset_module, "SHOWN", 100)
    cases = damaged(png)
    good = ("<image>Good?", "1", [png()])
    rows = rows_of(schema, [good] + [(f"<image>{name}?", "1", [data]) for name, (data, _) in cases.items()])
    file = write(tmp_path / "a.parquet", schema, rows)
    kept = make_dataset(file, on_bad_row="skip")
    assert [prompt.row for prompt in kept] == [0]
    assert [bad.row for bad in kept.bad_rows] == list(range(1, 1 + len(cases)))
    for bad, (name, (_, said)) in zip(kept.bad_rows, cases.items(), strict=True):
        assert said in bad.reason and "0x" not in bad.reason and "\n" not in bad.reason, name


BROKEN_ROWS = {
    "answer missing": ({"answer": None}, "`answer` is missing or empty"),
    "answer blank": ({"answer": " "}, "`answer` is missing or empty"),
    "problem list": ({"problem": ["a"]}, "`problem` is a list whose item 1 is no message"),
    "problem object": ({"problem": {"role": "user"}}, "`problem` is a dict; it must be text or a number"),
    "no problem": ({"problem": None}, "`problem` is missing or empty"),
    "no image in a list": ({"images": [None]}, "image 1 of 1 is unreadable: is a NoneType"),
    "list in a list": ({"images": [["a.png"]]}, "image 1 of 1 is unreadable: is a list"),
    "number for an image": ({"images": 5}, "image 1 of 1 is unreadable: is a int"),
    "object for an image": ({"images": [{"url": "x"}]}, "image 1 of 1 is unreadable: has neither bytes nor a path"),
    "no file": ({"images": ["none.png"]}, "none.png) is unreadable: No such file or directory"),
    "a folder": ({"images": ["."]}, ") is unreadable: Is a directory"),
    "no image": ({"images": None}, "image token mismatch: 1 <image> in `problem` but 0 in `images`"),
    "image too many": ({"images": ["a.png", "a.png"]}, "image token mismatch: 1 <image> in `problem` but 2"),
    "too long": ({"problem": "<image>" + "long " * 500}, "prompt too long: "),
}


def test_broken_rows_are_named_by_index_and_counted(make_dataset, png, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(png())
    good = {"images": ["a.png"], "problem": "<image>Good?", "answer": 3}
    rows = [good] + [good | change for change, _ in BROKEN_ROWS.values()]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = make_dataset(file, on_bad_row="skip", max_prompt_tokens=400)
    assert [prompt.answer for prompt in kept] == ["3"]
    assert [bad.row for bad in kept.bad_rows] == list(range(1, len(rows)))
    for bad, (name, (_, said)) in zip(kept.bad_rows, BROKEN_ROWS.items(), strict=True):
        assert said in bad.reason, name
    (line,) = capsys.readouterr().err.splitlines()  # one line, which names the first five
    assert line.startswith(f"mssr: {file}: {len(BROKEN_ROWS)} of {len(rows)} rows are skipped: row 1: `answer` is ")
    assert line.endswith(f"; and {len(BROKEN_ROWS) - 5} more")


def test_a_list_of_answers_in_parquet(make_dataset, png, tmp_path, capsys):
    table = pyarrow.table({"question": ["a?", "b?"], "answer": [["A"], ["B", "C"]]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert [prompt.answer for prompt in make_dataset(tmp_path / "a.parquet")] == ['["A"]', '["B", "C"]']
    assert "2 of 2 answers are lists or objects; the reward gets JSON\n" in capsys.readouterr().err


def test_a_truncated_file(make_dataset, problems, tmp_path):
    file = write(tmp_path / "a.parquet", "geometry3k", rows_of("geometry3k", problems))
    whole = file.read_bytes()
    for cut in (whole[:-50], whole[: len(whole) // 2], whole[:4] + np.random.default_rng(0).bytes(2000) + whole[2004:]):
        file.write_bytes(cut)
        with pytest.raises(UserError, match="a.parquet: not a readable parquet file: "):
            make_dataset(file)
