"""The demo's problems: real digits, right answers, no scan shared between splits."""

import io
import re

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from transformers import Qwen2VLImageProcessorPil

from examples.digits.problems import main, split_scans, write_digits
from examples.tiny.model import train_tokenizer
from mssr.config.data_keys import DataConfig
from mssr.data.dataset import ProblemDataset
from mssr.data.prompts import PromptEncoder
from mssr.errors import UserError
from mssr.rewards.extract import last_boxed, well_formed

SIZES = {"train": 120, "val": 40, "test": 40}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits"), seed=0, **SIZES)


def rows_of(file):
    return pyarrow.parquet.read_table(file).to_pylist()


def scans_of(row):
    (image,) = row["images"]
    assert re.fullmatch(r"\d{4}(_\d{4})+\.png", image["path"])
    return tuple(int(scan) for scan in image["path"].removesuffix(".png").split("_"))


def shows(picture, scan):
    """Return whether the [56, 56] picture is the [8, 8] scan, scaled up."""
    small = picture.reshape(8, 7, 8, 7).mean((1, 3))
    return np.corrcoef(small.ravel(), scan.ravel())[0, 1] > 0.95


def gray(row):
    return np.asarray(Image.open(io.BytesIO(row["images"][0]["bytes"])).convert("L"), dtype=float)


def test_sizes_and_images(written):
    for split, count in SIZES.items():
        rows = rows_of(written[split])
        assert len(rows) == count
        assert len({(scans_of(row), row["problem"]) for row in rows}) == count
        for row in rows:
            image = Image.open(io.BytesIO(row["images"][0]["bytes"]))
            assert (image.size, image.mode, image.format) == ((112, 56), "RGB", "PNG")


def test_images_show_the_scans_and_answers_are_theirs(written):
    digits = load_digits()
    seen = set()
    for row in rows_of(written["train"]):
        left, right = scans_of(row)
        a, b = int(digits.target[left]), int(digits.target[right])
        question = row["problem"].removeprefix("<image>").lower()
        if "sum" in question or "add" in question:
            answer = a + b
        elif "difference" in question or "subtract" in question:
            answer = max(a, b) - min(a, b)
        else:
            assert "larger" in question
            answer = max(a, b)
        seen.add(question)
        assert row["answer"] == str(answer) == last_boxed(row["solution"])
        assert row["solution"] == f"<think>{a} {b}</think>\\boxed{{{answer}}}" and well_formed(row["solution"])
        pixels = gray(row)
        assert shows(pixels[:, :56], digits.images[left]) and shows(pixels[:, 56:], digits.images[right])
    assert len(seen) == 6


def test_splits_share_no_scan_whatever_the_seed(written, tmp_path):
    other = write_digits(tmp_path, seed=1, **SIZES)
    used = {
        split: {scan for files in (written, other) for row in rows_of(files[split]) for scan in scans_of(row)}
        for split in SIZES
    }
    assert not used["train"] & used["val"] and not used["train"] & used["test"] and not used["val"] & used["test"]


def test_scan_splits_are_stratified_and_whole():
    labels = load_digits().target
    splits = split_scans(labels)
    assert sorted(sum(splits.values(), [])) == list(range(len(labels)))
    for digit in range(10):
        counts = {split: int((labels[scans] == digit).sum()) for split, scans in splits.items()}
        assert abs(counts["train"] / sum(counts.values()) - 0.6) < 0.01
        assert abs(counts["val"] - counts["test"]) <= 2


def test_same_seed_same_bytes(written, tmp_path):
    again = write_digits(tmp_path / "again", seed=0, **SIZES)
    other = write_digits(tmp_path / "other", seed=1, **SIZES)
    for split in SIZES:
        assert again[split].read_bytes() == written[split].read_bytes() != other[split].read_bytes()


def test_both_formats_hold_the_same_problems(written, tmp_path):
    options = DataConfig(train="unused", min_pixels=784, max_pixels=100_352)
    encoder = PromptEncoder(train_tokenizer(["a digit"], 300), Qwen2VLImageProcessorPil(), options)
    lines = write_digits(tmp_path, seed=0, format="jsonl", **SIZES)
    for split in SIZES:
        ours, theirs = (ProblemDataset(str(files[split]), encoder, options) for files in (written, lines))
        assert ours.fingerprint == theirs.fingerprint
    assert ours[0].image_grid_thw.tolist() == [[1, 4, 8]]


def test_the_command_writes_as_many_as_it_is_told(tmp_path, monkeypatch, capsys):
    told = [str(tmp_path), "--train", "3", "--val", "2", "--test", "1", "--format", "jsonl"]
    monkeypatch.setattr("sys.argv", ["problems", *told])
    main()
    files = [tmp_path / f"{split}.jsonl" for split in ("train", "val", "test")]
    assert [len(file.read_text().splitlines()) for file in files] == [3, 2, 1]
    assert str(tmp_path / "val.jsonl") in capsys.readouterr().out


@pytest.mark.parametrize(("format", "name"), [("parquet", "val.parquet"), ("jsonl", "val.jsonl"), ("jsonl", "val")])
def test_files_that_are_there_are_kept(tmp_path, format, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name}: already there; name another folder"):
        write_digits(tmp_path, train=1, val=1, test=1, format=format)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "mine"


def test_more_problems_than_scans_give(tmp_path):
    with pytest.raises(UserError, match=r"^digits: val=1000000 is more than the \d+ problems that its scans allow$"):
        write_digits(tmp_path, train=1, val=1_000_000)


# Worked out by hand. Question -> function of the digits that returns (first intermediate result, answer).
CHAINS = {
    "Add the first two digits, then the difference of that and the third.": lambda a, b, c: (a + b, abs(a + b - c)),
    "Add the first two digits, then add the third.": lambda a, b, c: (a + b, a + b + c),
    "Add the first two digits, then the larger of that and the third.": lambda a, b, c: (a + b, max(a + b, c)),
    "Take the difference of the first two digits, then the difference of that and the third.": lambda a, b, c: (
        abs(a - b),
        abs(abs(a - b) - c),
    ),
    "Take the difference of the first two digits, then add the third.": lambda a, b, c: (abs(a - b), abs(a - b) + c),
    "Take the difference of the first two digits, then the larger of that and the third.": lambda a, b, c: (
        abs(a - b),
        max(abs(a - b), c),
    ),
    "Take the larger of the first two digits, then the difference of that and the third.": lambda a, b, c: (
        max(a, b),
        abs(max(a, b) - c),
    ),
    "Take the larger of the first two digits, then add the third.": lambda a, b, c: (max(a, b), max(a, b) + c),
    "Take the larger of the first two digits, then the larger of that and the third.": lambda a, b, c: (
        max(a, b),
        max(a, b, c),
    ),
}


def test_three_digits_ask_a_chain_of_two_operations(tmp_path):
    digits = load_digits()
    rows = rows_of(write_digits(tmp_path, digits=3, **SIZES)["train"])
    seen = set()
    for row in rows:
        scans = scans_of(row)
        a, b, c = (int(digits.target[scan]) for scan in scans)
        question = row["problem"].removeprefix("<image>")
        first, answer = CHAINS[question](a, b, c)
        seen.add(question)
        assert row["answer"] == str(answer)
        assert row["solution"] == f"<think>{a} {b} {c} {first}</think>\\boxed{{{answer}}}"
        pixels = gray(row)
        assert pixels.shape == (56, 168)
        for number, scan in enumerate(scans):
            assert shows(pixels[:, 56 * number : 56 * (number + 1)], digits.images[scan])
    assert seen == CHAINS.keys()


def test_chains_go_on_to_the_sixth_digit_and_share_no_scan(tmp_path):
    files = write_digits(tmp_path, digits=6, **SIZES)
    used = {split: {scan for row in rows_of(files[split]) for scan in scans_of(row)} for split in SIZES}
    assert not used["train"] & used["val"] and not used["train"] & used["test"] and not used["val"] & used["test"]
    labels = load_digits().target
    for row in rows_of(files["val"]):
        shown = [int(labels[scan]) for scan in scans_of(row)]
        value, thoughts = shown[0], shown[:]
        steps = row["problem"].removeprefix("<image>").removesuffix(".").split(", then ")
        assert [step.rpartition(" ")[2] for step in steps] == ["digits", "third", "fourth", "fifth", "sixth"]
        for step, digit in zip(steps, shown[1:]):
            if "add" in step.lower():
                value += digit
            elif "difference" in step:
                value = max(value, digit) - min(value, digit)
            else:
                assert "larger" in step
                value = max(value, digit)
            thoughts.append(value)
        numbers = " ".join(map(str, thoughts[:-1]))
        assert row["solution"] == f"<think>{numbers}</think>\\boxed{{{value}}}" and row["answer"] == str(value)


@pytest.mark.parametrize("digits", [1, 7])
def test_too_few_or_too_many_digits(tmp_path, digits):
    with pytest.raises(UserError, match=rf"^digits: digits={digits}: an image shows 2 to 6 digits$"):
        write_digits(tmp_path, digits=digits)
