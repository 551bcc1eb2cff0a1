"""`mssr export` writes the trained policy: plain transformers and peft load it and get the trainer's log-probs."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from option_helpers import LORA, make_engine_with, options
from peft import PeftModel
from policy_helpers import ALONE, model_dir, plain_logp, plain_model, processors, random_batch
from safetensors.torch import load_file
from transformers import AutoImageProcessor
from typer.testing import CliRunner

from mssr.cli import app
from mssr.config.schema import TrainConfig
from mssr.data.prompts import load_processors
from mssr.errors import UserError
from mssr.policy.export import save_trained
from mssr.policy.loss import CrossEntropy
from mssr.training.checkpoint import Checkpoints

KINDS = {"plain": {}, "frozen tower": {"train_vision": False}, "lora": {"lora": LORA}}


class TrainedRun:
    """A run folder with checkpoints of steps 1 and 2, and the trainer's log-probs of `batch` at each."""

    def __init__(self, folder: Path, kind: str, tied: bool, batch) -> None:
        self.folder, self.batch, self.scores = folder, batch, {}
        model = options(model_dir(tied), **KINDS[kind])
        self.engine = make_engine_with(model)
        checkpoints = Checkpoints(folder, ALONE, TrainConfig(async_save=False))
        for step in (1, 2):
            self.engine.update(batch, CrossEntropy())
            self.scores[step] = self.engine.score(batch)
            checkpoints.save(step, self.engine, {})
        checkpoints.close()
        # Settings of the training machine: flash-attn, which needs a GPU, and a file that does not exist here.
        config = {
            "run_dir": str(folder),
            "model": model.model_dump() | {"attention": "flash", "liger": "on"},
            "data": {"train": "unused", "min_pixels": 784, "max_pixels": 12_544},
            "train": {"deepspeed": "elsewhere/zero2.json"},
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config))

    def export(self, *arguments: str):
        return CliRunner().invoke(app, ["export", str(self.folder), *arguments], catch_exceptions=True)

    def assert_scores(self, model, step: int, tolerance: float = 1e-5) -> None:
        with torch.no_grad():
            found = plain_logp(model, self.batch).float()
        torch.testing.assert_close(found, self.scores[step], atol=tolerance, rtol=0)
        other = {1: 2, 2: 1}[step]
        assert (found - self.scores[other]).abs().max() > 10 * tolerance


@pytest.fixture(scope="module")
def trained(world, prompts, tmp_path_factory):
    def make(kind: str, tied: bool = False) -> TrainedRun:
        if (kind, tied) not in runs:
            folder = tmp_path_factory.mktemp("runs") / "run"
            runs[kind, tied] = TrainedRun(folder, kind, tied, random_batch(prompts, [5, 9, 3, 7, 1, 12]))
        return runs[kind, tied]

    runs = {}
    return make


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_plain_transformers_scores_as_the_trainer_did(trained, tmp_path, kind, tied):
    run, out = trained(kind, tied), tmp_path / "deeper" / "out"
    printed = run.export("--out", str(out))
    assert printed.exit_code == 0 and printed.output.strip().endswith(f"step 2 {out}")
    run.assert_scores(plain_model(out), 2)
    saved, original = (load_file(Path(folder) / "model.safetensors") for folder in (out, model_dir(tied)))
    assert {name: value.shape for name, value in saved.items()} == {n: v.shape for n, v in original.items()}
    files = {path.name for path in out.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "preprocessor_config.json"} <= files
    assert load_processors(out)[0].get_vocab() == processors()[0].get_vocab()
    assert json.loads((out / "config.json").read_text()) == json.loads(
        (Path(model_dir(tied)) / "config.json").read_text()
    )
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    size = AutoImageProcessor.from_pretrained(out).size
    assert (size["shortest_edge"], size["longest_edge"]) == (784, 12_544)  # as the run had them


@pytest.mark.parametrize("tied", [False, True])
def test_peft_puts_the_adapter_on_the_start(trained, tmp_path, tied):
    run, out = trained("lora", tied), tmp_path / "adapter"
    out.mkdir()  # an empty folder may exist
    assert run.export("--out", str(out), "--adapter").exit_code == 0
    assert {path.name for path in out.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    run.assert_scores(PeftModel.from_pretrained(plain_model(model_dir(tied)), out), 2)
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == model_dir(tied)


def save_from_ranks(world, folder, batch, zero_stage):
    """Train one step on this rank's half of the rows and save it. Return the log-probs of all rows."""
    engine = make_engine_with(options(lora=LORA), zero_stage=zero_stage, world=world)
    checkpoints = Checkpoints(folder, world, TrainConfig(async_save=False))
    half = len(batch) // 2
    engine.update(batch.rows(world.rank * half, (world.rank + 1) * half), CrossEntropy())
    checkpoints.save(1, engine, {})
    checkpoints.close()
    save_trained(engine.policy, processors(), folder, world)
    return engine.score(batch)


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_a_run_of_two_ranks(ranks, prompts, tmp_path, zero_stage):
    batch, run = random_batch(prompts, [5, 9, 3, 7, 1, 12]), tmp_path / "run"
    scores, _ = ranks(save_from_ranks, run, batch, zero_stage)
    config = {"run_dir": str(run), "model": options(lora=LORA).model_dump(), "data": {"train": "unused"}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    for arguments in ([], ["--adapter"]):
        out = tmp_path / ("adapter" if arguments else "out")
        assert CliRunner().invoke(app, ["export", str(run), "--out", str(out), *arguments]).exit_code == 0
    start = plain_model(model_dir())
    models = [
        plain_model(tmp_path / "out"),
        plain_model(run / "model"),
        PeftModel.from_pretrained(plain_model(model_dir()), tmp_path / "adapter"),
        PeftModel.from_pretrained(plain_model(model_dir()), run / "adapter"),
    ]
    with torch.no_grad():
        assert (plain_logp(start, batch) - scores).abs().max() > 1e-2
        for model in models:
            torch.testing.assert_close(plain_logp(model, batch).float(), scores, atol=1e-5, rtol=0)


def test_an_earlier_step(trained, tmp_path):
    run = trained("plain")
    assert run.export("--out", str(tmp_path / "out"), "--step", "1").exit_code == 0
    run.assert_scores(plain_model(tmp_path / "out"), 1)


def test_another_dtype(trained, tmp_path):
    run, out = trained("lora"), tmp_path / "out"
    assert run.export("--out", str(out), "--dtype", "bfloat16").exit_code == 0
    saved = load_file(out / "model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("tied", [False, True])
def test_the_end_of_a_run_leaves_the_same(trained, tmp_path, tied):
    run = trained("lora", tied)
    save_trained(run.engine.policy, processors(), tmp_path, ALONE)
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["adapter", "model"]
    run.assert_scores(plain_model(tmp_path / "model"), 2)
    run.assert_scores(PeftModel.from_pretrained(plain_model(model_dir(tied)), tmp_path / "adapter"), 2)
    save_trained(run.engine.policy, processors(), tmp_path, ALONE)  # replaces what an earlier run left
    run.export("--out", str(tmp_path / "exported"))
    exported, saved = (load_file(tmp_path / name / "model.safetensors") for name in ("exported", "model"))
    assert all(torch.equal(value, saved[name]) for name, value in exported.items()) and exported.keys() == saved.keys()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--out", "{taken}"], "--out {taken}: already there; name a new folder"),
        (["--out", "{out}", "--step", "7"], "--step 7: {run} has checkpoints of steps 1, 2; name one of them"),
        (["--out", "{out}", "--adapter"], "--adapter: {run}/config.yaml has no model.lora"),
        (["--out", "{out}", "--dtype", "int8"], "--dtype int8: choose bfloat16 or float32"),
    ],
)
def test_what_cannot_be_exported(trained, tmp_path, arguments, message):
    run = trained("plain")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    places = {"taken": tmp_path / "taken", "out": tmp_path / "out", "run": run.folder}
    error = run.export(*(argument.format(**places) for argument in arguments)).exception
    assert isinstance(error, UserError) and str(error).startswith(message.format(**places))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]


def test_a_folder_that_is_no_run(tmp_path):
    arguments = ["export", str(tmp_path), "--out", str(tmp_path / "out")]
    assert "no config.yaml in it" in str(CliRunner().invoke(app, arguments).exception)
    config = {"run_dir": str(tmp_path), "model": {"path": model_dir()}, "data": {"train": "unused"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert "no checkpoint in it; train first" in str(CliRunner().invoke(app, arguments).exception)
