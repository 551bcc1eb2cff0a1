"""`data.*`: files, weights and names of columns."""

import pytest

from mssr.config import yaml_1_2
from mssr.config.data_keys import weights_of, written

TEXT = "run_dir: run\nmodel: {path: m}\ndata:\n  train: t.parquet\n  val: v.parquet\n"


@pytest.mark.parametrize(
    ("value", "weights", "text"),
    [
        ("a", {"a": 1}, "a"),
        ("[a, b:test]", {"a": 1, "b:test": 1}, "a, b:test"),
        ("{a: 2, ~/b: 0.5}", {"a": 2, "HOME/b": 0.5}, "a x 2, HOME/b x 0.5"),
    ],
)
@pytest.mark.parametrize("key", ["data.train", "sft.data"])
def test_one_file_or_several(load, monkeypatch, key, value, weights, text):
    monkeypatch.setenv("HOME", "HOME")
    config = load(f"{key}={value}")
    found = config.data.train if key == "data.train" else config.sft.data
    assert weights_of(found) == weights and written(found) == text
    assert load(text=yaml_1_2.dump(config.model_dump(mode="json"))) == config  # as in a run's config.yaml


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("3", "expected a path, [path, ...] or {path: weight, ...}, got 3; write a number in quotes"),
        ("[a, 3]", "expected a path, [path, ...] or {path: weight, ...}, got ['a', 3]"),
        ("[]", "names no file"),
        ("{}", "names no file"),
        ("[a, b, a]", "a is listed twice; to draw its rows more often write {a: 2}"),
        ("{a: 0}", "the weight of a is 0; expected a number > 0, such as 1 or 0.5"),
        ("{a: true}", "the weight of a is True; expected"),
        ("{a: .inf}", "the weight of a is inf; expected"),
        ("['']", "is empty; is a shell variable not set?"),
    ],
)
def test_what_is_no_list_of_files(refused, value, why):
    assert f"data.train: {why}" in refused(f"data.train={value}")


def test_names_of_columns_by_file(load):
    data = load("data.columns={problem: q, v.parquet: {answer: a}}", "data.columns.images=pic", text=TEXT).data
    assert data.columns_of("t.parquet") == {"problem": "q", "images": "pic"}
    assert data.columns_of("v.parquet") == {"answer": "a"}
    assert load(text=TEXT.replace("val", "columns:\n  val")).data.columns == {}


@pytest.mark.parametrize(
    ("override", "why"),
    [
        (
            "data.columns.awnser=a",
            "awnser is not a column that is read (images, problem, answer, solution); did you mean ans",
        ),
        ("data.columns={v.parquet: {image: a}}", "image is not a column that is read"),
        ("data.columns.answer=3", "answer is 3; expected the name of a column in the file"),
        ("data.columns={x.parquet: {answer: a}}", "data.columns has names for x.parquet, which is not in data.train"),
        ("data.columns=3", "Input should be a valid dictionary"),
    ],
)
def test_names_that_make_no_sense(refused, override, why):
    assert why in refused(override, text=TEXT)


def test_solved_prompts_need_a_tracker_and_epochs(refused, load):
    load("data.drop_solved=0.9")
    grouped = ["algorithm.name=grpo", "rollout.responses_per_prompt=8"]
    assert "data.drop_solved needs the value tracker" in refused("data.drop_solved=0.9", *grouped)
    assert "data.drop_solved is for epochs" in refused("data.drop_solved=0.9", "algorithm.name=spo")
    assert "data.drop_solved" in refused("data.drop_solved=1.5")
