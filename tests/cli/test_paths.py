"""Paths as people type them, in the configuration and in options of commands."""

import json

import pytest
from typer.testing import CliRunner

from bench import report as report_of
from bench.study import spec
from mssr.cli import app
from mssr.config import load_config
from mssr.errors import UserError
from mssr.observe.metrics import MetricsLog

KEYS = ("run_dir", "model.path", "data.train", "data.val", "sft.data", "train.deepspeed")


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("run_dir: run\nmodel: {path: org/model}\ndata: {train: org/data}\n")
    return file


def value(config, key):
    for part in key.split("."):
        config = getattr(config, part)
    return str(config)


@pytest.mark.parametrize("key", KEYS)
def test_a_tilde_is_the_home_folder_for_every_key(home, config, key):
    (home / "x").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    assert value(load_config(config, [f"{key}=~/x"]), key) == str(home / "x")


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("typed", ["", '"  "'])
def test_an_empty_path_is_refused_for_every_key(config, key, typed):
    with pytest.raises(UserError, match=f"{key}: is empty; is a shell variable not set"):
        load_config(config, [f"{key}={typed}"])


@pytest.mark.parametrize("key", KEYS)
def test_a_line_break_in_a_path_is_refused_for_every_key(config, key):
    for typed in (r'"a\nb"', r'"a\0b"'):
        with pytest.raises(UserError, match=f"{key}: 'a.*b' has a line break or another control character") as caught:
            load_config(config, [f"{key}={typed}"])
        assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "typed, words",
    [
        ("~nobody-9/x", "run_dir: ~nobody-9/x: there is no such home folder; write ./~nobody-9/x"),
        ("$SCRATCH/x", "run_dir: .SCRATCH is not expanded in a file"),
        ("/data/${USER}/x", "run_dir: .{USER} is not expanded in a file"),
    ],
)
def test_a_folder_that_nobody_meant_is_not_made(config, typed, words):
    with pytest.raises(UserError, match=words):
        load_config(config, [f"run_dir={typed}"])


def test_a_split_in_the_home_folder_and_hub_names(home, config):
    found = load_config(config, ["data.val=~/rows:test"])
    assert (found.data.val, found.data.train, found.model.path) == (f"{home}/rows:test", "org/data", "org/model")


def test_a_study_reads_paths_like_a_run(home, tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text("out: ~/out\nconfig: ~/c.yaml\nquestion: q\nmatch: updates\nbudget: 1\narms: {a: {}}\n")
    assert [spec.load_study(file).out, spec.load_study(file).config] == [home / "out", home / "c.yaml"]
    file.write_text("out: ''\nconfig: c.yaml\nquestion: q\nmatch: updates\nbudget: 1\narms: {a: {}}\n")
    with pytest.raises(UserError, match="out: is empty"):
        spec.load_study(file)


def plotted(*arguments):
    return CliRunner().invoke(app, ["plot", *map(str, arguments)])


@pytest.fixture
def metrics(tmp_path):
    log = MetricsLog(tmp_path / "run")
    log.write(1, {"train/reward": 0.5})
    log.close()
    return tmp_path / "run"


def test_options_read_paths_like_keys(home, metrics):
    assert plotted(metrics, "--out=~/curves.png").exit_code == 0 and (home / "curves.png").is_file()
    assert "--out is empty" in str(plotted(metrics, "--out=").exception)
    assert "--out is empty" in str(CliRunner().invoke(app, ["export", str(metrics), "--out="]).exception)


def test_a_plot_replaces_an_earlier_plot_and_nothing_else(metrics):
    for _ in range(2):
        assert plotted(metrics).exit_code == 0
    assert sorted(path.name for path in metrics.iterdir()) == ["curves.png", "metrics.jsonl"]
    mine = metrics / "mine.png"
    for content in (b"a picture", (metrics / "curves.png").read_bytes().replace(b"mssr plot", b"paint 3.0")):
        mine.write_bytes(content)
        assert "not drawn by `mssr plot`" in str(plotted(metrics, "--out", mine).exception)
        assert mine.read_bytes() == content
    before = (metrics / "metrics.jsonl").read_bytes()
    assert "name a .png file" in str(plotted(metrics, "--out", metrics / "metrics.jsonl").exception)
    assert (metrics / "metrics.jsonl").read_bytes() == before


def test_a_benchmark_replaces_an_earlier_report_and_nothing_else(tmp_path):
    file = tmp_path / "kernels.json"
    for case in (1, 2):
        report_of.save({"machine": {}, "cases": [case]}, file)
    assert report_of.load(file)["cases"] == [2] and list(tmp_path.iterdir()) == [file]
    for mine in ("notes", '{"cases": []}', "[]"):
        file.write_text(mine)
        with pytest.raises(UserError, match="no report of a benchmark"):
            report_of.save({"machine": {}}, file)
        assert file.read_text() == mine
