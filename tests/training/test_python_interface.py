"""`from mssr import train, load_config`: the same training as on the command line, with callbacks."""

import json
import subprocess
import sys

import pytest
import yaml
from run_folder import RunFolder

import mssr as package
from mssr import load_config
from mssr.errors import UserError
from mssr.observe.metrics import read_metrics

SESSION = "tests.training.python_session"


def test_importing_the_package_loads_nothing():
    code = "import sys, mssr; assert not {'torch', 'pydantic', 'transformers', 'yaml'} & set(sys.modules); mssr.nothing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.strip().endswith("AttributeError: module 'mssr' has no attribute 'nothing'")
    assert {"load_config", "train"} <= set(package.__all__)


def test_a_config_from_a_dict(warm):
    values = yaml.safe_load(warm.read_text())
    assert load_config(values, ["seed=3"]) == load_config(warm, ["seed=3"])
    assert "seed" not in values  # the caller's dict stays as it is
    with pytest.raises(UserError, match=r"^config: unknown key train.step; did you mean train.steps\?$"):
        load_config(values | {"train": {"step": 1}})


def test_two_runs_in_a_process_are_those_of_the_command_line(mssr, warm, whole, tmp_path):
    """The second one is in a thread, as in some notebooks; Python allows signal handlers in the main one only."""
    said = json.loads(mssr("-m", SESSION, warm, tmp_path, "twice").check().out.splitlines()[-1])
    for name in ("first", "second"):
        RunFolder(tmp_path / name).assert_same_as(whole)
    written = [line for line in read_metrics(tmp_path / "first" / "metrics.jsonl") if line["step"]]
    assert [step for step, _ in said["seen"]] == [1, 2, 3, 4, 5, 6]
    assert all(metrics.items() <= line.items() for (_, metrics), line in zip(said["seen"], written))
    assert said["before"] == said["after"] and said["left"] == 0  # their memory is free for the next run
    assert said["steps"] == 6 and f"summary    {tmp_path}/first/summary.json" in said["returned"]


@pytest.mark.slow("60 s: vLLM twice in a process; only here its end must leave the next run's process group alone")
def test_two_runs_in_a_process_with_vllm_are_equal(mssr, warm, tmp_path):
    values = yaml.safe_load(warm.read_text())
    values["rollout"]["engine"] = "vllm"
    config = tmp_path / "vllm.yaml"
    config.write_text(yaml.safe_dump(values))
    mssr("-m", SESSION, config, tmp_path, "twice").check()
    RunFolder(tmp_path / "second").assert_same_as(RunFolder(tmp_path / "first"))


def test_a_callback_that_returns_false_ends_the_run_which_can_be_resumed(mssr, warm, whole, run):
    assert json.loads(mssr("-m", SESSION, warm, run.path, "stopped").check().out.splitlines()[-1]) == {"steps": 3}
    assert run.checkpoints[-1] == "step_000003" and (run.path / "model").is_dir()
    assert json.loads((run.path / "summary.json").read_text())["steps"] == 3
    mssr("train", warm, run.override, "--resume").check()
    run.assert_same_as(whole)
    assert json.loads((run.path / "summary.json").read_text())["steps"] == 6


def test_an_error_of_a_callback_ends_the_run_after_the_step_is_saved(mssr, warm, run):
    ended = mssr("-m", SESSION, warm, run.path, "failing")
    assert ended.code == 1 and ended.err.strip().endswith("KeyError: 'no such metric'") and "on_step" in ended.err
    assert run.checkpoints[-1] == "step_000003" and run.metrics[-1]["step"] == 3
    assert not (run.path / "model").exists()


def test_what_stands_where_the_curves_would_go_costs_a_line_not_the_model(mssr, warm, run):
    ended = mssr("-m", SESSION, warm, run.path, "in_the_way").check()
    assert f"mssr: curves.png was not drawn: {run.path / 'curves.png'}: already there" in ended.err
    assert (run.path / "curves.png").read_text() == "mine" and not (run.path / "model" / "curves.png").exists()
    assert "curves.png" not in (run.path / "README.md").read_text()
