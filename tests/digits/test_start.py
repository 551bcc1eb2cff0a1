"""The starting point of RL on digits: reused if finished, redone if not, refused if made with other settings."""

import json

import pytest
import yaml

from examples.digits.start import MARKER, DigitsSettings, digits_start
from mssr.config import load_config
from mssr.data.files import open_rows
from mssr.errors import UserError

SMALL = DigitsSettings(digits=3, train=24, val=8, test=4, hidden=64, layers=1, vision_layers=1)
SHORT = ["sft.steps=1", "sft.batch_size=8", "log.trackers=[]"]


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("config") / "digits.yaml"
    values = {
        "run_dir": "unused",
        "device": "cpu",
        "model": {"path": "unused"},
        "data": {"train": "unused", "val": "unused", "min_pixels": 784, "max_pixels": 2352},
        "train": {"zero_stage": 0},
    }
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.fixture(scope="module")
def started(config_file, tmp_path_factory):
    """Make a start in a folder with an unfinished one, whose warm start had already written metrics."""
    folder = tmp_path_factory.mktemp("starts") / "seed_5"
    (folder / "sft").mkdir(parents=True)
    (folder / "sft" / "metrics.jsonl").write_text("{}\n")
    (folder / MARKER).write_text(json.dumps({"finished": False}))
    return folder, digits_start(folder, config_file, 5, SHORT, SMALL)


def contents(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_half_a_start_is_redone(started, config_file):
    folder, start = started
    assert json.loads((folder / "sft" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 1
    rows = {split: open_rows(str(getattr(start, split))) for split in ("train", "val", "test")}
    assert {split: len(those) for split, those in rows.items()} == {"train": 24, "val": 8, "test": 4}
    assert rows["val"][0]["problem"].count(", then ") == 1
    model = json.loads((start.model / "config.json").read_text())
    assert model["text_config"]["hidden_size"] == 64 and model["text_config"]["num_hidden_layers"] == 1
    assert "step" in (folder / "sft.log").read_text()
    run = load_config(config_file, start.overrides)
    assert (run.model.path, run.data.train, run.data.val) == (str(start.model), str(start.train), str(start.val))


def test_a_finished_start_is_taken_as_it_is(started, config_file):
    folder, start = started
    before = contents(folder)
    # Settings of the RL that follows do not affect the start.
    assert digits_start(folder, config_file, 5, [*SHORT, "algorithm.name=mvsr", "train.steps=7"], SMALL) == start
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("seed", "override", "settings", "said"),
    [
        (6, "seed=6", SMALL, "seed 5, this run has 6"),
        (5, "sft.optimizer.lr=0.5", SMALL, "sft.optimizer.*this run has.*0.5"),
        (5, "eval.max_problems=4", SMALL, "eval.max_problems None, this run has 4"),
        (5, "seed=5", SMALL.model_copy(update={"digits": 4}), "start.digits 3, this run has 4"),
    ],
)
def test_a_start_made_otherwise_is_not_taken(started, config_file, seed, override, settings, said):
    folder, _ = started
    before = contents(folder)
    with pytest.raises(UserError, match=rf"its warm start was made with {said}.*remove the folder, or choose another"):
        digits_start(folder, config_file, seed, [*SHORT, override], settings)
    assert contents(folder) == before


@pytest.mark.parametrize("text", ["", '{"finished": tr', "[]", "{}"])
def test_a_damaged_marker_is_named(tmp_path, config_file, text):
    (tmp_path / MARKER).write_text(text)
    with pytest.raises(UserError, match=f"^{tmp_path / MARKER}: damaged; remove it and the rest of"):
        digits_start(tmp_path, config_file, 0, SHORT, SMALL)
    assert [path.name for path in tmp_path.iterdir()] == [MARKER]


def test_nothing_else_is_removed(tmp_path, config_file):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="exists and is not a warm start; choose another folder"):
        digits_start(tmp_path, config_file, 0)
    assert (tmp_path / "data" / "thesis.txt").exists()


def test_a_start_cut_short_is_not_finished(tmp_path, config_file):
    (tmp_path / MARKER).write_text(json.dumps({"finished": False}))
    (tmp_path / "sft.log").mkdir()  # the log cannot be opened, so the command cannot start
    with pytest.raises(IsADirectoryError):
        digits_start(tmp_path, config_file, 0, SHORT, SMALL)
    assert (tmp_path / "untrained" / "config.json").is_file()
    assert json.loads((tmp_path / MARKER).read_text())["finished"] is False


@pytest.mark.slow("6 s: a command that fails in a process of its own")
def test_a_failed_warm_start_says_where_to_look(tmp_path, config_file):
    folder = tmp_path / "start"
    with pytest.raises(UserError, match=r"mssr sft failed, see .*sft\.log"):
        digits_start(folder, config_file, 0, [*SHORT, "data.max_prompt_tokens=1"], SMALL)
    assert "max_prompt_tokens" in (folder / "sft.log").read_text()
