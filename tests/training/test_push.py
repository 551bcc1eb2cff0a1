"""`mssr push` uploads model and card; a local server stands for the hub."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml
from hub_stand_in import TOKEN, stand_in
from huggingface_hub import ModelCard, constants
from typer.testing import CliRunner

from mssr.cli import app
from mssr.errors import UserError
from mssr.outputs import replace

RECORDS = [
    {"step": 0, "val/accuracy": 0.25},
    {"step": 2, "val/accuracy": 0.5, "cost/updates": 4},
    {"step": 4, "val/accuracy": 0.75, "cost/updates": 8},
]


@pytest.fixture
def hub(monkeypatch):
    with stand_in() as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the stand-in has git's storage only
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture
def finished(tmp_path, material):
    """A run folder as at the end of a run, with small files in place of weights."""
    run_dir = tmp_path / "run"
    for name in ("model", "adapter"):
        (run_dir / name).mkdir(parents=True)
        (run_dir / name / "config.json").write_text(name)
        (run_dir / name / "weights.safetensors").write_bytes(name.encode() * 1000)
        (run_dir / name / "README.md").write_text("of the folder")
    config = {"run_dir": str(run_dir), "model": {"path": str(material / "untrained"), "lora": {}}}
    config |= {"data": {"train": "alice/digits:train", "val": "val.parquet"}, "train": {"deepspeed": "elsewhere.json"}}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    known = {"rollout_engine": "hf", "ranks": 1, "command": "mssr train my.yaml", "versions": {"mssr": "0.1"}}
    (run_dir / "summary.json").write_text(json.dumps(known))
    (run_dir / "curves.png").write_bytes(b"curves")
    replace(run_dir, "README.md", lambda partial: partial.write_text("of the run"))
    return run_dir


def push(*arguments):
    return CliRunner().invoke(app, ["push", *map(str, arguments)])


def refusal(*arguments):
    error = push(*arguments).exception
    assert isinstance(error, UserError) and "\n" not in str(error)
    return str(error)


def test_every_file_arrives_as_it_is_with_a_card_for_the_hub(hub, finished):
    printed = push(finished, "alice/counts")
    assert printed.stdout.strip().splitlines()[-1] == f"{hub.address}/alice/counts"
    uploaded = hub.repositories["alice/counts"]
    card = uploaded["files"].pop("README.md").decode()
    assert uploaded == {
        "visibility": "public",
        "files": {"config.json": b"model", "weights.safetensors": b"model" * 1000, "curves.png": b"curves"},
    }
    data = ModelCard(card).data
    assert (data.library_name, data.pipeline_tag, data.datasets) == (
        "transformers",
        "image-text-to-text",
        ["alice/digits"],
    )
    assert data.base_model is None and data.license is None  # a folder; not known
    (result,) = data.eval_results
    assert data.model_name == "counts" and result.metric_value == 75.0
    assert "# counts\n" in card and 'path = "alice/counts"' in card and "vllm serve alice/counts" in card
    assert "mssr train my.yaml" in card and "| accuracy | 25.0% | 75.0% |" in card and "](curves.png)" in card
    assert list(finished.glob(".push*")) == []


def test_a_private_repository(hub, finished):
    assert push(finished, "alice/counts", "--private").exit_code == 0
    assert hub.repositories["alice/counts"]["visibility"] == "private"


def test_an_edited_card_is_pushed_as_it_is(hub, finished):
    (finished / "README.md").write_text("---\nlicense: mit\n---\nmine")
    assert push(finished, "alice/counts").exit_code == 0
    assert hub.repositories["alice/counts"]["files"]["README.md"] == b"---\nlicense: mit\n---\nmine"


def test_the_adapter_alone(hub, finished, material):
    assert push(finished, "alice/adapter", "--adapter").exit_code == 0
    files = hub.repositories["alice/adapter"]["files"]
    assert files["weights.safetensors"] == b"adapter" * 1000
    card = files["README.md"].decode()
    assert ModelCard(card).data.library_name == "peft" and "LoRA adapter for" in card
    assert f"vllm serve {material / 'untrained'} --enable-lora --lora-modules mssr=alice/adapter" in card


def test_a_repository_that_is_there_needs_the_option(hub, finished):
    assert push(finished, "alice/counts").exit_code == 0
    line = refusal(finished, "alice/counts")
    assert line == "alice/counts: already there; name a new repository, or add a commit to this one with --update"
    (finished / "model" / "config.json").write_text("better")
    assert push(finished, "alice/counts", "--update").exit_code == 0
    assert hub.repositories["alice/counts"]["files"]["config.json"] == b"better"
    assert "no such repository" in refusal(finished, "alice/other", "--update")


@pytest.mark.parametrize(
    "name, said",
    [("alice/a/b", "no name for the hub"), ("a b", "no name for the hub"), ("counts", "counts: no owner; name the")],
)
def test_a_malformed_name(hub, finished, name, said):
    assert said in refusal(finished, name) and hub.requests == []


def test_what_the_hub_refuses(hub, finished, monkeypatch):
    assert "the token may not write there (You don't have the rights" in refusal(finished, "bob/counts")
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    assert refusal(finished, "alice/counts").startswith("alice/counts: the hub does not accept the token; log in with")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "nowhere")
    assert refusal(finished, "alice/counts").startswith("no token for the hub; log in with")
    assert hub.repositories == {}


def test_no_connection(hub, finished, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert "the hub cannot be reached" in refusal(finished, "alice/counts")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refusal(finished, "alice/counts") == "HF_HUB_OFFLINE is set: unset it to push"


def test_an_upload_that_fails_says_how_to_go_on(hub, finished):
    hub.down = ("/api/models/alice/counts/commit",)
    line = refusal(finished, "alice/counts")
    assert "the hub refused (503): overloaded; the repository is there now: push again with --update" in line
    hub.down = ()
    assert push(finished, "alice/counts", "--update").exit_code == 0


def test_what_there_is_nothing_to_push_of(hub, finished, tmp_path):
    assert "no config.yaml in it" in refusal(tmp_path, "alice/counts")
    assert "--private: a repository that is there" in refusal(finished, "alice/counts", "--private", "--update")
    shutil.rmtree(finished / "model")
    assert refusal(finished, "alice/counts").endswith("not there: the run has not ended; push a checkpoint with --step")
    assert hub.requests == []


def test_a_checkpoint_is_exported_and_gets_the_card_of_its_step(hub, whole):
    """Step 4 of 6: validated last at step 3."""
    assert push(whole.path, "alice/step", "--step", 4).exit_code == 0
    files = hub.repositories["alice/step"]["files"]
    assert {"config.json", "tokenizer.json", "preprocessor_config.json", "model.safetensors", "curves.png"} < set(files)
    assert hub.messages == ["Checkpoint of step 4, by mssr push"]
    card = files["README.md"].decode()
    assert "| | step 0 | step 3 |" in card and ", 4 steps, seed 0" in card
    assert files["model.safetensors"] != (whole.path / "model" / "model.safetensors").read_bytes()
    assert list(whole.path.glob(".push*")) == []


@pytest.mark.slow("8 s of imports: the process reads address and token from the environment")
def test_as_a_command(finished):
    with stand_in() as hub:
        env = os.environ | {
            "HF_ENDPOINT": hub.address,
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }
        command = [sys.executable, "-m", "mssr", "push", str(finished), "alice/counts"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == f"{hub.address}/alice/counts"
        assert "weights.safetensors" in hub.repositories["alice/counts"]["files"]
