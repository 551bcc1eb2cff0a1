"""Every shipped configuration loads, and trains a tiny model for one step on tiny data."""

import json
from pathlib import Path

import pytest
import yaml

from mssr.config import load_config, validate_config

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs").glob("*.yaml"))
CONFIGS = [path for path in FILES if "arms" not in yaml.safe_load(path.read_text())]  # tests/study tests the others
RUNS = [
    (path, preset) for path in CONFIGS for preset in ("default", "paper") if preset == "default" or "3b" in path.name
]


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)  # paths in the files are relative to it


def test_they_are_there():
    names = {path.name for path in CONFIGS}
    assert {"tiny.yaml", "qwen2_5_vl_3b.yaml", "qwen2_5_vl_7b.yaml", "qwen2_5_vl_7b_1gpu.yaml"} <= names
    for path in (ROOT / "configs" / "deepspeed").glob("*.json"):
        assert json.loads(path.read_text())["zero_optimization"]["stage"] == int(path.stem[4])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_what_a_run_writes_of_it_is_the_same_configuration(path):
    for preset in ("default", "paper") if "qwen" in path.name else ("default",):
        config = load_config(path, [f"preset={preset}"])
        written = yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        assert validate_config(written) == config


@pytest.mark.parametrize("path", [path for path in CONFIGS if "qwen" in path.name], ids=lambda path: path.stem)
def test_paper_is_what_they_say_in_paper(path):
    """The files leave the algorithm to the preset; the one for one GPU sets n_init and what adapters require."""
    algorithm = yaml.safe_load(path.read_text()).get("algorithm", {})
    assert algorithm in ({}, {"old_logp": "recompute", "tis_cap": 2.0, "tracker": {"n_init": 0}})


@pytest.mark.parametrize("path, preset", RUNS, ids=lambda value: getattr(value, "stem", value))
def test_a_step_of_each(mssr, material, tmp_path, path, preset):
    run_dir = tmp_path / "run"
    zero_stage = load_config(path).train.zero_stage
    mssr(
        "train", path, f"preset={preset}", f"run_dir={run_dir}", "device=cpu", "rollout.engine=hf",
        f"model.path={material / 'untrained'}", f"data.train={material / 'data' / 'train.parquet'}",
        f"data.val={material / 'data' / 'val.parquet'}", "data.min_pixels=3136", "data.max_pixels=12544",
        "data.max_prompt_tokens=128", "rollout.prompts_per_step=16", "rollout.max_response_tokens=8",
        "train.responses_per_update=8", "train.micro_batch_tokens=256", "train.steps=1", "eval.max_problems=4",
        "model.dtype=float32", "log.trackers=[]",
    ).check()  # fmt: skip
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1]
    assert (run_dir / "model").is_dir()
    written = load_config(run_dir / "config.yaml")
    assert (written.preset, written.train.zero_stage) == (preset, zero_stage)
    tracker = written.algorithm.tracker.preset
    assert tracker == ("reference" if preset == "paper" else "default")
