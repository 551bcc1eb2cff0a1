"""Several files, names of columns, and what is left out."""

import json
import pickle

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from mssr.data.dataset import ProblemDataset
from mssr.data.report import write_data_report
from mssr.data.solved import Solved
from mssr.errors import UserError


@pytest.fixture
def write(tmp_path):
    """Return a function that writes rows as JSON lines: `write(name, *rows)`; a text is a problem with answer 1."""

    def make(name, *rows):
        rows = [{"problem": row, "answer": "1"} if isinstance(row, str) else row for row in rows]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return make


@pytest.fixture
def make_set(make_encoder):
    def make(sources, **keys):
        encoder = make_encoder(**keys)
        return ProblemDataset(sources, encoder, encoder.config)

    return make


def refusal(make_set, *arguments, **keys) -> str:
    with pytest.raises(UserError) as caught:
        make_set(*arguments, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Several files


def test_rows_know_their_file(make_set, write):
    a, b = write("a.jsonl", "0?", "1?", ""), write("b.jsonl", "", "2?")
    problems = make_set([a, b], on_bad_row="skip")
    assert [(prompt.source, prompt.row, prompt.problem) for prompt in problems] == [
        (a, 0, "0?"), (a, 1, "1?"), (b, 1, "2?"),
    ]  # fmt: skip
    assert [prompt.problem for prompt in problems.load([2, 0])] == ["2?", "0?"]
    assert [(bad.source, bad.row) for bad in problems.bad_rows] == [(a, 2), (b, 0)]
    assert problems.parts == [(2, 1.0), (1, 1.0)] and problems.source == f"{a}, {b}"
    assert f"2 of 5 rows cannot be used: {a}, row 2: `problem` is missing" in refusal(make_set, [a, b])


def test_a_problem_in_two_files_is_one(make_set, write):
    a, b = write("a.jsonl", "0?", "1?"), write("b.jsonl", "1?", "2?")
    keys = make_set([a, b]).keys
    assert keys[1] == keys[2] and len(set(keys)) == 3
    other = write("c.jsonl", {"problem": "1?", "answer": "7"})
    line = refusal(make_set, [a, other])
    assert f"{other}, row 0: same problem as row 1 of {a} with a different answer ('7', there '1')" in line


def test_the_fingerprint_is_of_the_problems_and_weights(make_set, write):
    a, b, both = write("a.jsonl", "0?", "1?"), write("b.jsonl", "2?"), write("both.jsonl", "0?", "1?", "2?")
    assert make_set([a, b]).fingerprint == make_set(both).fingerprint == make_set({a: 1.0, b: 1.0}).fingerprint
    weighted = [{a: 2.0, b: 1.0}, {a: 1.0, b: 2.0}, {both: 2.0}, {both: 1.0}]
    assert len({make_set(sources).fingerprint for sources in weighted}) == 4
    assert make_set({a: 2.0, b: 0.5}).source == f"{a} x 2, {b} x 0.5"


# Names of columns


def test_columns_under_other_names(make_set, write, capsys):
    row = {"q": "1 + 1?", "truth": 2, "why": "So 2.", "answer": "wrong", "question": "Not this?"}
    file = write("a.jsonl", row)
    (prompt,) = make_set(file, columns={"problem": "q", "answer": "truth", "solution": "why"})
    assert (prompt.problem, prompt.answer, prompt.solution) == ("1 + 1?", "2", "So 2.")
    assert prompt.columns == {"question": "Not this?"}
    said = "columns besides the problem, for the reward: question, answer (data.columns names truth)\n"
    assert capsys.readouterr().err.endswith(said)


def test_a_column_has_one_use(make_set, write):
    """TRL's rows have the answer in `solution`, which must not be imitated as well."""
    (prompt,) = make_set(write("a.jsonl", {"prompt": "1 + 1?", "solution": "2"}), columns={"answer": "solution"})
    assert prompt.answer == "2" and prompt.solution is None
    line = refusal(make_set, write("b.jsonl", {"question": "2", "text": "1 + 1?"}), columns={"answer": "question"})
    assert "no column `problem` (found: question, text)" in line
    both = {"answer": "solution", "solution": "solution"}
    assert make_set(write("c.jsonl", {"problem": "?", "solution": "2"}), columns=both)[0].solution == "2"


def test_a_field_of_a_column(make_set, write):
    row = {"problem": "?", "info": {"truth": {"value": 7}}}
    (prompt,) = make_set(write("a.jsonl", row), columns={"answer": "info.truth.value"})
    assert prompt.answer == "7" and prompt.columns == {"info": row["info"]}


def test_pictures_under_any_name(make_set, tmp_path, png):
    rows = [{"problem": "?", "answer": "1", "drawing": png(), "image_width": 56, "boxes": [[1, 2]]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (prompt,) = make_set(str(tmp_path / "a.parquet"), columns={"images": "drawing"})
    assert prompt.images == (png(),) and prompt.columns == {"image_width": 56, "boxes": [[1, 2]]}


def test_names_for_one_file(make_set, write):
    ours, theirs = write("a.jsonl", "0?"), write("b.jsonl", {"q": "1?", "a": "1"})
    both = make_set([ours, theirs], columns={theirs: {"problem": "q", "answer": "a"}})
    assert [prompt.problem for prompt in both] == ["0?", "1?"]
    with pytest.raises(UserError, match=f"data.columns.problem: {ours} has no column `q`"):
        make_set([ours, theirs], columns={"problem": "q", "answer": "a"})


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hub"])
def test_a_name_that_is_not_there(make_set, tmp_path, kind, monkeypatch):
    rows = [{"question": "?", "ground_truth": "1"}]
    source = "someone/problems" if kind == "hub" else str(tmp_path / f"a.{kind}")
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[0]))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.Dataset.from_list(rows))
    line = refusal(make_set, source, columns={"answer": "groundtruth"})
    assert line.startswith(f"data.columns.answer: {source} has no column `groundtruth` (found: ")
    assert line.endswith("; did you mean ground_truth?")
    assert make_set(source, columns={"answer": "ground_truth"})[0].answer == "1"


def test_bulky_columns_of_pictures_are_not_kept(make_set, tmp_path, png):
    row = {"problem": "?", "answer": "1", "images": [png()], "image_preview": png(), "image_size": [56, 56]}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    assert make_set(str(tmp_path / "a.parquet"))[0].columns == {"image_size": [56, 56]}


def test_a_value_of_another_column_that_does_not_convert_is_left_out(make_set, tmp_path):
    bad = pyarrow.Array.from_buffers(pyarrow.string(), 2, pyarrow.array([b"ok", b"\xff"], pyarrow.binary()).buffers())
    columns = {"problem": ["0?", "1?"], "answer": ["1", "1"], "note": bad, "level": [1, 2]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    kept = make_set(str(tmp_path / "a.parquet"))
    assert [prompt.columns for prompt in kept] == [{"note": "ok", "level": 1}, {"level": 2}]


def test_large_columns_count_in_the_cache(make_set, write):
    rows = [{"problem": f"{n}?", "answer": "1", "text": "x" * 100_000} for n in range(4)]
    problems = make_set(write("a.jsonl", *rows), cache_gib=250_000 / 2**30)
    for index in range(4):
        problems[index]
    assert len(pickle.dumps(rows[0]["text"])) * 2 < problems._loader._cache.nbytes <= 250_000


# Filters


def test_only_overlong_prompts_are_dropped(make_set, write, capsys):
    file = write("a.jsonl", "0?", "long " * 50, "1?")
    problems = make_set(file, drop_overlong=True, max_prompt_tokens=100)
    assert [prompt.row for prompt in problems] == [0, 2] and [bad.row for bad in problems.overlong] == [1]
    assert "1 of 3 rows are too long and left out: row 1: prompt too long: " in capsys.readouterr().err
    broken = write("b.jsonl", "0?", "long " * 50, "")
    line = refusal(make_set, broken, drop_overlong=True, max_prompt_tokens=100)
    assert "1 of 3 rows cannot be used: row 2: `problem` is missing" in line
    line = refusal(make_set, write("c.jsonl", "long " * 50), drop_overlong=True, max_prompt_tokens=100)
    assert line.endswith("; no usable row is left")


def test_the_report(make_set, write, tmp_path):
    a, b = write("a.jsonl", "0?", "", "1?"), write("b.jsonl", "long " * 50, "2?")
    trained = make_set([a, b], drop_overlong=True, on_bad_row="skip", max_prompt_tokens=100)
    run = tmp_path / "run"
    run.mkdir()
    for _ in range(2):  # it replaces its own
        write_data_report(run, {"train": trained, "val": None}, {2: Solved(epoch=3, value=0.96)})
    first, second = json.loads((run / "data_report.json").read_text())["train"]
    assert (first["source"], first["rows"], first["overlong"], first["solved"]) == (a, 3, [], [])
    assert [bad["row"] for bad in first["bad"]] == [1] and "`problem` is missing" in first["bad"][0]["why"]
    assert (second["source"], second["rows"], second["bad"]) == (b, 2, [])
    assert [bad["row"] for bad in second["overlong"]] == [0]
    assert second["solved"] == [{"row": 1, "value": 0.96, "not_from_epoch": 4}]
