"""Columns under other names, and columns and markers of what is not read."""

import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from mssr.data.prompts import Unusable
from mssr.errors import UserError

ROW = {"problem": "How many?", "answer": "3"}


@pytest.fixture(params=["jsonl", "parquet"])
def write(tmp_path, request):
    """Return a function that writes rows to a file of either format."""

    def make(rows):
        file = tmp_path / f"rows.{request.param}"
        if request.param == "jsonl":
            file.write_text("\n".join(map(json.dumps, rows)))
        else:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        return file

    return make


def test_other_columns_are_named_once_and_kept_for_the_reward(make_dataset, write, capsys):
    others = [{"id": n, "subject": "art", "boxes": [[n, 0.5]], "meta": {"of": None}} for n in range(3)]
    file = write([ROW | {"problem": f"{n}?", "images": []} | other for n, other in enumerate(others)])
    assert [prompt.columns for prompt in make_dataset(file)] == others
    said = f"mssr: {file}: columns besides the problem, for the reward: id, subject, boxes, meta\n"
    assert capsys.readouterr().err == said


def test_nothing_is_said_when_all_is_read(make_dataset, write, capsys):
    make_dataset(write([ROW | {"solution": "So 3.", "images": []}]))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("column", ["image", "images", "image_path", "image_paths"])
def test_names_of_the_image_column(make_dataset, write, png, tmp_path, column):
    (tmp_path / "a.png").write_bytes(png())
    assert make_dataset(write([ROW | {column: "a.png"}]))[0].images == (png(),)
    assert make_dataset(write([ROW | {column: ["a.png", "a.png"]}]))[0].images == (png(), png())


def test_our_name_comes_first_and_an_empty_one_does_not_hide_the_other(make_dataset, write, png, tmp_path, capsys):
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(png(seed=number))
    rows = [{"images": "0.png", "image": "1.png"}, {"images": None, "image": "1.png"}]
    first, second = make_dataset(write([ROW | row | {"problem": f"{n}?"} for n, row in enumerate(rows)]))
    assert first.images == (png(seed=0),) and second.images == (png(seed=1),)
    assert "for the reward: image (where images is filled)\n" in capsys.readouterr().err


MEDIA = ["videos", "video", "video_path", "videoPath", "audio", "audios", "input_audio", "clip_mp4"]
PICTURES = [
    "image_1",
    "img",
    "img_path",
    "imgname",
    "decoded_image",
    "image_url",
    "imageFile",
    "picture",
    "jpg",
    "image_id",
]


@pytest.mark.parametrize("column", MEDIA)
def test_rows_with_something_that_is_not_read_are_refused(make_dataset, write, column):
    rows = [ROW | {"problem": f"{n}?", "images": [], column: value} for n, value in enumerate(["a.mp4", "", None])]
    kept = make_dataset(write(rows), on_bad_row="skip")
    assert [prompt.row for prompt in kept] == [1, 2]
    assert kept.bad_rows[0].reason.startswith(f"`{column}` holds something that is not read; only pictures in ")


@pytest.mark.parametrize("column", PICTURES)
def test_pictures_under_a_name_that_is_not_read_are_refused(make_dataset, make_encoder, write, column):
    with pytest.raises(UserError, match=f"1 of 1 rows cannot be used: row 0: `{column}` holds something"):
        make_dataset(write([ROW | {column: "a.png"}]))
    with pytest.raises(Unusable, match=f"^`{column}` holds something"):
        make_encoder().check(ROW | {column: {"bytes": b"x"}})


def test_films_in_parquet_and_on_the_hub(make_dataset, tmp_path, monkeypatch):
    rows = [ROW | {"problem": f"{n}?", "videos": films} for n, films in enumerate([[{"bytes": b"film"}], []])]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    hub = datasets.Dataset.from_list(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: hub)
    for source in (tmp_path / "a.parquet", "someone/films"):
        kept = make_dataset(source, on_bad_row="skip")
        assert [bad.row for bad in kept.bad_rows] == [0] and [prompt.row for prompt in kept] == [1]


def test_notes_about_images_are_no_images(make_dataset, write, png, tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    notes = {"images": ["a.png"], "image_width": 56, "image_id": 7, "video_id": "x7", "figure_caption": "A"}
    assert len(make_dataset(write([ROW | notes]))) == 1


@pytest.mark.parametrize("marker", ["<video>", "<audio>", "<image_1>", "<image 1>", "<|image|>", "<img>", "<Image>"])
def test_markers_that_are_not_read_are_refused(make_encoder, png, marker):
    row = {"images": [png()], "problem": f"What is in {marker}?", "answer": "1"}
    with pytest.raises(Unusable, match="^`problem` contains <.*, which nothing is put in for; only <image> is read$"):
        make_encoder().check(row)


def test_text_that_looks_like_markers(make_encoder):
    make_encoder().check({"problem": "If a <image_of(b)> c and 3 < video > 2?", "answer": "1"})
