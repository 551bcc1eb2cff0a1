"""Problem datasets: every source gives the same prompts, and every bad row is named."""

import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch

from mssr.data.prompts import PromptEncoder
from mssr.errors import BadRow, UserError


def write_rows(file, rows):
    """Write rows as Parquet, JSON lines or JSON, by the file's suffix; for JSON, images become files beside it."""
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        return file
    (file.parent / "pictures").mkdir(exist_ok=True)
    for number, row in enumerate(rows):
        for place, image in enumerate(row.get("images", [])):
            name = f"pictures/{number}_{place}.png"
            (file.parent / name).write_bytes(image["bytes"])
            row["images"][place] = name
    lines = [json.dumps(row) for row in rows]
    file.write_text("[" + ",\n".join(lines) + "]" if file.suffix == ".json" else "\n".join(lines) + "\n\n")
    return file


@pytest.fixture
def rows(png):
    """Return a function that makes good rows, new ones on each call, because tests and `write_rows` change them."""

    def make(count=5):
        return [
            {"images": [{"bytes": png(seed=n), "path": f"{n}.png"}], "problem": f"<image>Is it {n}?", "answer": str(n)}
            for n in range(count)
        ]

    return make


def error(make_dataset, path, **keys) -> str:
    with pytest.raises(UserError) as caught:
        make_dataset(path, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_format_gives_the_same_prompts(make_dataset, rows, tmp_path, monkeypatch):
    hub = datasets.Dataset.from_list(
        rows(),
        features=datasets.Features(
            {
                "images": datasets.List(datasets.Image()),
                "problem": datasets.Value("string"),
                "answer": datasets.Value("string"),
            }
        ),
    )
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: asked.append((name, split)) or hub)
    sets = [make_dataset(write_rows(tmp_path / name, rows())) for name in ("a.parquet", "b.jsonl", "c.json")]
    sets += [make_dataset("someone/problems"), make_dataset("someone/problems:test")]
    assert asked == [("someone/problems", "train"), ("someone/problems", "test")]
    assert len({one.fingerprint for one in sets}) == 1
    for one in sets:
        assert len(one) == 5 and one.bad_rows == []
        for prompt, first in zip(one, sets[0], strict=True):
            assert (prompt.key, prompt.row, prompt.answer) == (first.key, first.row, first.answer)
            assert torch.equal(prompt.pixel_values, first.pixel_values)
            assert torch.equal(prompt.token_ids, first.token_ids)


def test_a_directory_is_its_files_in_order(make_dataset, rows, tmp_path):
    for number, name in enumerate(["train-00001.parquet", "train-00000.parquet"]):
        write_rows(tmp_path / name, rows(5)[number * 2 : number * 2 + 2])
    (tmp_path / "dataset_info.json").write_text("{}")
    both = make_dataset(tmp_path)
    assert [prompt.answer for prompt in both] == ["2", "3", "0", "1"]
    assert [prompt.row for prompt in both] == [0, 1, 2, 3]


def test_splits_of_a_directory_are_not_mixed(make_dataset, rows, tmp_path):
    write_rows(tmp_path / "train.parquet", rows(3))
    write_rows(tmp_path / "test.parquet", rows(2))
    assert error(make_dataset, tmp_path) == (
        f"{tmp_path}: holds several splits (test, train); name one, for example {tmp_path}:train"
    )
    assert len(make_dataset(f"{tmp_path}:train")) == 3
    assert error(make_dataset, f"{tmp_path}:val") == (
        f"{tmp_path}: no .parquet, .jsonl or .json file whose name starts with 'val' in this directory"
    )


def test_relative_images_of_json_lines_start_at_their_file(make_dataset, rows, tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    write_rows(tmp_path / "set" / "a.jsonl", rows())
    monkeypatch.chdir(tmp_path)
    assert len(make_dataset("set/a.jsonl")) == 5


def test_other_names_of_the_columns(make_dataset, rows, tmp_path):
    renamed = [{"image": r["images"][0], "question": r["problem"], "answer": r["answer"], "id": "x"} for r in rows()]
    ours = make_dataset(write_rows(tmp_path / "a.parquet", rows()))
    assert make_dataset(write_rows(tmp_path / "b.parquet", renamed)).fingerprint == ours.fingerprint


def test_bad_rows_fail_with_index_and_count(make_dataset, rows, tmp_path):
    bad = rows(9)
    bad[2]["answer"] = ""
    bad[4]["images"][0]["bytes"] = b"junk"
    file = write_rows(tmp_path / "a.parquet", bad)
    line = error(make_dataset, file)
    assert line.startswith(f"{file}: 2 of 9 rows cannot be used: row 2: `answer` is missing or empty; fill it in ")
    assert "; row 4: image 1 of 1 (4.png) is unreadable: " in line
    assert line.endswith("; fix them or set data.on_bad_row: skip")
    for row in bad:
        row["answer"] = None
    bad[0]["answer"] = "0"
    line = error(make_dataset, write_rows(tmp_path / "a.parquet", bad))
    assert "row 5: " in line and "row 6: " not in line and "; and 3 more;" in line


def test_bad_rows_are_skipped_on_demand(make_dataset, rows, tmp_path):
    bad = rows()
    bad[1]["problem"] = None
    bad[3]["problem"] = "<image><image>"
    file = write_rows(tmp_path / "a.parquet", bad)
    kept = make_dataset(file, on_bad_row="skip")
    assert len(kept) == 3 and [kept[i].row for i in range(3)] == [0, 2, 4]
    assert [bad.row for bad in kept.bad_rows] == [1, 3]
    assert kept.source == str(file) and str(kept.bad_rows[0]).startswith(f"{file}, row 1: `problem` is missing")
    for row in bad:
        row["answer"] = ""
    line = error(make_dataset, write_rows(tmp_path / "a.parquet", bad), on_bad_row="skip")
    assert line.endswith("; no usable row is left")


def test_too_long_rows_are_found_at_load(make_dataset, rows, tmp_path):
    long = rows()
    long[3]["problem"] += " or not" * 20
    line = error(make_dataset, write_rows(tmp_path / "a.parquet", long), max_prompt_tokens=100)
    assert "1 of 5 rows cannot be used: row 3: prompt too long: " in line


def test_one_problem_two_answers(make_dataset, rows, tmp_path):
    twice = rows() + rows(2)
    assert len(make_dataset(write_rows(tmp_path / "a.parquet", twice))) == 7
    twice[6]["answer"] = "8"
    line = error(make_dataset, write_rows(tmp_path / "a.parquet", twice))
    assert "row 6: same problem as row 1 with a different answer ('8', there '1'); keep one of them" in line


def test_fingerprint_follows_content_and_order(make_dataset, rows, tmp_path):
    def fingerprint(changed):
        return make_dataset(write_rows(tmp_path / "a.parquet", changed)).fingerprint

    others = [rows() for _ in range(4)]
    others[0][0]["answer"] = "1"
    others[1][0]["problem"] += "?"
    others[2][0]["images"] = rows()[1]["images"]
    others[3][0]["images"], others[3][0]["problem"] = [], "Is it 0?"
    assert fingerprint(rows()) == fingerprint(rows())
    different = [rows(), rows()[::-1], rows(4), *others]
    assert len({fingerprint(changed) for changed in different}) == len(different)


def test_the_fingerprint_of_the_solutions(make_dataset, rows, tmp_path):
    def fingerprints(*solutions):
        solved = [row | {"solution": text} for row, text in zip(rows(), solutions, strict=True)]
        problems = make_dataset(write_rows(tmp_path / "a.parquet", solved), on_bad_row="skip")
        return problems.fingerprint, problems.solutions_fingerprint

    found = [
        fingerprints("a", "b", "c", "d", "e"),
        fingerprints("a", "b", "c", "d", "e "),
        fingerprints("ab", "", "c", "d", "e"),
        fingerprints("b", "a", "c", "d", "e"),
        fingerprints(None, None, None, None, None),
    ]
    assert len({problems for problems, _ in found}) == 1
    assert len({solutions for _, solutions in found}) == len(found)
    unusable = "<|image_pad|>"  # a special token, so that the row is left out
    assert fingerprints(unusable, "b", "c", "d", "e")[1] not in {solutions for _, solutions in found}


@pytest.fixture
def encoded(monkeypatch):
    """Return a list that records the index of each row as it is encoded."""
    rows, encode = [], PromptEncoder.encode
    monkeypatch.setattr(
        PromptEncoder, "encode", lambda self, row, index, source: rows.append(index) or encode(self, row, index, source)
    )
    return rows


def test_prompts_are_encoded_once(make_dataset, rows, tmp_path, encoded):
    one = make_dataset(write_rows(tmp_path / "a.parquet", rows()))
    first, again = one[0], one[0]
    assert torch.equal(first.pixel_values.view(torch.int32), again.pixel_values.view(torch.int32))
    assert torch.equal(first.token_ids, again.token_ids) and first.images == again.images
    one.begin([1, 2, 3])
    assert [prompt.row for prompt in one.load([3, 2, 1, 0])] == [3, 2, 1, 0]
    assert sorted(encoded) == [0, 1, 2, 3]
    one.close()


def test_the_cache_is_bounded_by_its_key(make_dataset, rows, tmp_path, encoded):
    file = write_rows(tmp_path / "a.parquet", rows())
    prompt = make_dataset(file)[0]
    packed = prompt.pixel_values.nbytes // 8 + prompt.token_ids.nbytes + prompt.image_grid_thw.nbytes
    size = packed + len(prompt.images[0])
    small = make_dataset(file, cache_gib=2.5 * size / 2**30)
    encoded.clear()
    for index in (0, 1, 0, 2, 0, 1):  # row 2 evicts row 1
        small[index]
    assert encoded == [0, 1, 2, 1]
    encoded.clear()
    none = make_dataset(file, cache_gib=0)
    none[0], none[0]
    assert encoded == [0, 0]


def test_a_row_that_breaks_later_is_the_same_error(make_dataset, rows, tmp_path):
    one = make_dataset(write_rows(tmp_path / "a.jsonl", rows()))
    (tmp_path / "pictures" / "2_0.png").unlink()
    with pytest.raises(BadRow, match=r"a.jsonl, row 2: image 1 of 1 .* No such file or directory"):
        one[2]


def test_sources_that_cannot_be_read(make_dataset, tmp_path, rows):
    assert error(make_dataset, tmp_path / "no.parquet").endswith(
        "no.parquet: no such file or directory; give a .parquet or .jsonl file, or a hub name"
    )
    assert error(make_dataset, tmp_path).endswith("no .parquet, .jsonl or .json file in this directory")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    assert error(make_dataset, empty) == f"{empty}: has no rows"
    column = write_rows(tmp_path / "column.parquet", [{"images": [], "problem": "?", "label": 1}])
    assert error(make_dataset, column) == (
        f"{column}: no column `answer` (found: images, problem, label); "
        "rows need `problem` and `answer`, and `images` where there are any; other names: data.columns.answer=NAME"
    )
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"problem": "?", "answer": 1}\n{"problem": ')
    assert error(make_dataset, broken) == f"{broken}, line 2, column 13: not valid JSON: Expecting value"
    broken.write_text('{"problem": "?", "answer": 1}\n3\n')
    assert error(make_dataset, broken) == f"{broken}, row 1: a int; each row must be an object of columns"
    not_parquet = tmp_path / "x.parquet"
    not_parquet.write_bytes(b"PAR0")
    assert error(make_dataset, not_parquet).startswith(f"{not_parquet}: not a readable parquet file: ")


def test_hub_names_that_do_not_load(make_dataset, monkeypatch):
    def absent(name, split):
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub.\nSee more")

    monkeypatch.setattr(datasets, "load_dataset", absent)
    assert error(make_dataset, "some/where:train") == (
        "some/where:train: neither a local file nor a hub dataset: Dataset 'some/where' doesn't exist on the Hub."
    )


def test_a_picture_that_was_replaced_since_it_was_checked(make_dataset, rows, png, tmp_path):
    """Its row would be trained on another picture, with the answer to the one before."""
    dataset = make_dataset(
        write_rows(tmp_path / "rows.jsonl", [{"problem": "", "answer": ""}, *rows()]), on_bad_row="skip"
    )
    (tmp_path / "pictures" / "2_0.png").write_bytes(png(seed=99))
    assert dataset[0].row == 1
    with pytest.raises(BadRow, match="rows.jsonl, row 2: its images have changed since they were checked; restore"):
        dataset[1]
