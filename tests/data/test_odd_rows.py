"""Whatever is wrong with a row, it is a bad row: one short line, and `on_bad_row: skip` goes on."""

import base64
import codecs
import errno
import json
import sys
from decimal import Decimal

import datasets
import pyarrow
import pyarrow.parquet
import pytest

import mssr.data.prompts as prompts_module
from mssr.data.prompts import PromptEncoder
from mssr.errors import BadRow, UserError

GOOD = {"problem": "2 + 3?", "answer": "5", "solution": "5"}
HALF = "2 + 4? \ud83d"


def skipped(make_dataset, file, **keys) -> list[str]:
    """Return why rows were skipped; row 0 is good and the only one."""
    kept = make_dataset(file, on_bad_row="skip", **keys)
    assert [prompt.row for prompt in kept] == [0]
    for bad in kept.bad_rows:
        assert "\n" not in bad.reason and len(bad.reason) < 600 and bad.reason.isprintable()
    return [bad.reason for bad in kept.bad_rows]


@pytest.mark.parametrize("column", GOOD)
@pytest.mark.parametrize("escaped", [True, False])
def test_half_of_a_surrogate_pair_in_json(make_dataset, tmp_path, column, escaped, capsys):
    text = "".join(json.dumps(row, ensure_ascii=escaped) + "\n" for row in (GOOD, GOOD | {column: HALF}))
    (tmp_path / "a.jsonl").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert skipped(make_dataset, tmp_path / "a.jsonl") == [
        f"`{column}` contains half of a surrogate pair, \\ud83d, at character 7, which is no text; remove it"
    ]
    assert "half of a surrogate pair" in capsys.readouterr().err


@pytest.mark.parametrize("column", GOOD)
def test_text_in_parquet_that_is_not_utf8(make_dataset, tmp_path, column):
    columns = {name: pyarrow.array([value, value], pyarrow.string()) for name, value in GOOD.items()}
    bad = pyarrow.array([GOOD[column].encode(), HALF.encode("utf-8", "surrogatepass")], pyarrow.binary())
    columns[column] = pyarrow.Array.from_buffers(pyarrow.string(), 2, bad.buffers())
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    (reason,) = skipped(make_dataset, tmp_path / "a.parquet")
    assert reason.startswith("cannot be prepared: ValueError: cannot be read: 'utf-8' codec can't decode byte 0xed")


def test_errors_that_nobody_foresaw(make_dataset, make_encoder, tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (GOOD, GOOD | {"problem": "odd"})))
    tokenize = PromptEncoder._tokenize

    def breaks(self, turns, images):
        if turns[0].text.startswith("odd"):
            raise RuntimeError("an error of a library\n" + "x" * 5000)
        return tokenize(self, turns, images)

    monkeypatch.setattr(PromptEncoder, "_tokenize", breaks)
    (reason,) = skipped(make_dataset, tmp_path / "a.jsonl")
    assert reason.startswith("cannot be prepared: RuntimeError: an error of a library xxx")
    with pytest.raises(BadRow, match="^s, row 4: cannot be prepared: RuntimeError: an error of a library x"):
        make_encoder().encode(GOOD | {"problem": "odd"}, 4, "s")


def test_numbers_and_nesting_that_json_cannot_read(make_dataset, tmp_path):
    (tmp_path / "a.jsonl").write_text(f'{{"problem": "?", "answer": {"9" * (sys.get_int_max_str_digits() + 1)}}}')
    with pytest.raises(UserError, match="a.jsonl, line 1: not usable JSON: Exceeds the limit"):
        make_dataset(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text('{"problem": ' + "[" * 200_000)
    with pytest.raises(UserError, match="a.jsonl, line 1: not usable JSON: maximum recursion depth"):
        make_dataset(tmp_path / "a.jsonl")


def test_a_key_or_column_twice(make_dataset, tmp_path):
    """The last value would win without a word."""
    (tmp_path / "a.jsonl").write_text(json.dumps(GOOD) + '\n{"problem": "a", "answer": "1", "answer": "2"}\n')
    with pytest.raises(UserError, match="a.jsonl, line 2: not usable JSON: 'answer' is there twice"):
        make_dataset(tmp_path / "a.jsonl")
    columns = [pyarrow.array([text]) for text in ("2 + 3?", "5", "6")]
    pyarrow.parquet.write_table(pyarrow.table(columns, ["problem", "answer", "answer"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="a.parquet: column `answer` is there twice; remove one"):
        make_dataset(tmp_path / "a.parquet")


def test_numbers_of_any_type_are_written_as_a_person_writes_them(make_dataset, tmp_path, monkeypatch):
    answers = [
        pyarrow.array([0.1, None], pyarrow.float32()),
        pyarrow.array([Decimal("0.10"), Decimal("1E-7")], pyarrow.decimal128(9, 7)),
        pyarrow.array([2**62, 3], pyarrow.int64()),
    ]
    for column, texts in zip(answers, (["0.1"], ["0.1000000", "0.0000001"], [str(2**62), "3"]), strict=True):
        table = pyarrow.table({"problem": ["a", "b"], "answer": column})
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
        monkeypatch.setattr(datasets, "load_dataset", lambda name, split, table=table: datasets.Dataset(table))
        for source in (tmp_path / "a.parquet", "someone/numbers"):
            assert [prompt.answer for prompt in make_dataset(source, on_bad_row="skip")] == texts


def test_numbers_without_an_end(make_dataset, tmp_path):
    """JSON has none, but Python's parser reads them, and 1e400."""
    rows = [f'{{"problem": "{text}", "answer": {text}}}' for text in ("Infinity", "-Infinity", "1e400")]
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps(GOOD), *rows]))
    reasons = skipped(make_dataset, tmp_path / "a.jsonl")
    assert reasons == ["`answer` is not a finite number; write \\infty as text, or remove the row"] * 3


@pytest.mark.parametrize("text", [json.dumps(GOOD), json.dumps([GOOD])])
def test_a_byte_order_mark(make_dataset, tmp_path, text):
    (tmp_path / "a.json").write_bytes(codecs.BOM_UTF8 + text.encode())
    assert make_dataset(tmp_path / "a.json")[0].problem == GOOD["problem"]


@pytest.mark.parametrize("images", ["", " ", None, [], float("nan")])
def test_no_images(make_dataset, tmp_path, images):
    rows = [GOOD, {"problem": "<image>?", "answer": "1"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row | {"images": images}) + "\n" for row in rows))
    assert skipped(make_dataset, tmp_path / "a.jsonl") == [
        "image token mismatch: 1 <image> in `problem` but 0 in `images`; "
        "make them equal, or drop the markers to put all images first"
    ]


def test_base64_and_data_uris(make_dataset, png, tmp_path):
    text = base64.b64encode(png()).decode()
    uri = f"data:image/png;base64,{text}"
    forms = [uri, [uri], {"bytes": text}, [{"bytes": text, "path": "a.png"}], {"path": uri}]
    rows = [GOOD | {"problem": f"{n}?", "images": images} for n, images in enumerate(forms)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [prompt.images for prompt in make_dataset(tmp_path / "a.jsonl")] == [(png(),)] * len(forms)


def test_long_texts_are_cut(make_dataset, png, tmp_path):
    long = base64.b64encode(png(200, 200)).decode()
    values = [
        {"images": [""]},
        {"images": long},
        {"images": "x" * 1000},
        {"images": {"bytes": long + "?"}},
        {"images": f"data:image/png;base64,{long[:1000]}"},
        {"images": f"data:image/png,{long}"},
        {"problem": GOOD["problem"], "answer": "6" * 9000},
        {"images": "a\nb\ud83d.png"},
        {"images": "a\0.png"},
    ]
    rows = [GOOD] + [GOOD | {"problem": f"{n}?"} | value for n, value in enumerate(values)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    reasons = skipped(make_dataset, tmp_path / "a.jsonl")
    for reason, said in zip(
        reasons,
        (
            "image 1 of 1 is unreadable: is an empty path; ",
            "is text too long for a path",
            "File name too long",
            "is not valid base64",
            "image file is truncated",
            "is a data URI without base64",
            "same problem as row 0 with a different answer ('666",
            "a b\\ud83d.png) is unreadable",
            "is unreadable: ",
        ),
        strict=True,
    ):
        assert said in reason, reason
    with pytest.raises(UserError) as caught:
        make_dataset("x" * 5000 + ".jsonl")
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), MemoryError()])
def test_storage_or_memory_that_fails_is_no_bad_row(make_dataset, tmp_path, monkeypatch, error):
    """Skipping such a row would train on other data than the next start."""

    def fail(image):
        raise error

    monkeypatch.setattr(prompts_module, "image_bytes", fail)
    (tmp_path / "a.jsonl").write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD | {"images": ["a.png"]}))
    with pytest.raises((UserError, MemoryError), match="Input/output error; it is not the file|^$"):
        make_dataset(tmp_path / "a.jsonl", on_bad_row="skip")
