"""Model directories load, other directories give a one-line error, and what is saved loads in plain transformers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from policy_helpers import ALONE, edit_json, make_engine, model_dir, plain_inputs, plain_model, processors, random_batch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, GPT2Config, GPT2LMHeadModel

from mssr.data.prompts import load_processors
from mssr.errors import UserError
from mssr.policy.export import save_model
from mssr.policy.loading import check_model_path, load_policy
from mssr.policy.loss import CrossEntropy
from mssr_kernels import FusedLMHead


def refusal(load, path) -> str:
    with pytest.raises(UserError) as caught:
        load(path)
    line = str(caught.value)
    assert "\n" not in line and str(path) in line and line.startswith("model.path ")
    return line


def load(path):
    return load_policy(str(path), torch.float32)


@pytest.fixture
def copied(tmp_path) -> Path:
    return Path(shutil.copytree(model_dir(), tmp_path / "model"))


def test_a_folder_that_is_no_model(tmp_path):
    assert "no config.json" in refusal(load, tmp_path)
    assert "no config.json" in refusal(check_model_path, tmp_path)


def test_a_path_that_does_not_exist(tmp_path):
    refusal(load, tmp_path / "missing")


def test_a_config_that_is_no_json(copied):
    (copied / "config.json").write_text("{")
    refusal(load, copied)


def test_a_model_of_another_kind(tmp_path):
    size = {"vocab_size": 50, "n_embd": 32, "n_layer": 1, "n_head": 1}
    GPT2LMHeadModel(GPT2Config(**size)).save_pretrained(tmp_path)
    for line in (refusal(check_model_path, tmp_path), refusal(load, tmp_path)):
        assert "model_type gpt2 is not supported" in line and "qwen2_5_vl" in line


@pytest.mark.parametrize("part", ["visual.blocks.0", "layers.1.mlp", "lm_head"])
def test_a_tensor_missing_from_the_weights(copied, part):
    file = copied / "model.safetensors"
    tensors = load_file(file)
    dropped = next(name for name in tensors if part in name)
    save_file({name: value for name, value in tensors.items() if name != dropped}, file, {"format": "pt"})
    line = refusal(load, copied)
    assert "missing" in line and dropped.rpartition("visual.")[2].rpartition("layers.")[2] in line


def test_a_tensor_too_many(copied):
    file = copied / "model.safetensors"
    save_file(load_file(file) | {"model.stranger": torch.zeros(2)}, file, {"format": "pt"})
    assert "stranger" in refusal(load, copied)


def test_a_tensor_of_another_shape(copied):
    file = copied / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "layers.0.mlp" in name)
    save_file(tensors | {name: torch.zeros(3, 3)}, file, {"format": "pt"})
    assert "layers.0.mlp" in refusal(load, copied)


@pytest.mark.parametrize("kept", [0, 4, 1000, 100_000])
def test_weights_cut_short(copied, kept):
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    refusal(load, copied)


def test_weights_not_there(copied):
    (copied / "model.safetensors").unlink()
    refusal(load, copied)


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_is_fused_and_everything_else_as_it_was(tied):
    policy, plain = load(model_dir(tied)), plain_model(model_dir(tied))
    assert isinstance(policy.model.lm_head, FusedLMHead)
    embedding = policy.model.get_input_embeddings()
    assert (policy.model.lm_head.weight is embedding.weight) == tied
    state, expected = policy.model.state_dict(), plain.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], value) for name, value in expected.items())


@pytest.mark.parametrize("tied", [False, True])
def test_saved_after_an_update_loads_in_plain_transformers(world, prompts, tmp_path, tied):
    engine = make_engine(path=model_dir(tied), lr=1e-2)
    batch = random_batch(prompts, [5, 9, 3, 7, 1, 12])
    engine.update(batch, CrossEntropy())
    folder = save_model(engine.policy, processors(), tmp_path / "out", ALONE)

    saved = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager")
    inputs = plain_inputs(prompts[0], batch.response(0), saved)
    with torch.no_grad():
        logits = engine.policy.model(**inputs).logits
        possible = logits.isfinite()  # not for image and video pads: the policy masks them, the saved model does not
        assert possible.sum(-1).unique().tolist() == [logits.shape[-1] - 2]
        torch.testing.assert_close(saved(**inputs).logits[possible], logits[possible], atol=1e-5, rtol=0)
        assert (plain_model(model_dir(tied))(**inputs).logits - logits)[possible].abs().max() > 1e-2
    tensors = load_file(folder / "model.safetensors")
    assert tensors.keys() == load_file(Path(model_dir(tied)) / "model.safetensors").keys()
    assert ("lm_head.weight" in tensors) != tied
    assert all(
        torch.equal(value, load(folder).model.state_dict()[name])
        for name, value in engine.policy.model.state_dict().items()
    )


def test_save_writes_a_whole_folder_and_replaces_none(policy, tmp_path):
    folder = save_model(policy, processors(), tmp_path / "out", ALONE)
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"} <= names
    with pytest.raises(UserError, match="out: already there; name a new folder"):
        save_model(policy, processors(), folder, ALONE)
    assert {path.name for path in folder.iterdir()} == names
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    tokenizer, _ = processors()
    assert load_processors(folder)[0].get_vocab() == tokenizer.get_vocab()


def test_a_models_own_sampling_settings_survive_saving(copied, tmp_path):
    """Qwen2.5-VL ships such settings."""
    settings = {"do_sample": True, "temperature": 1e-6, "repetition_penalty": 1.05, "top_k": 1, "top_p": 0.001}
    edit_json(copied / "generation_config.json", **settings)
    folder = save_model(load(copied), processors(), tmp_path / "out", ALONE)
    saved = json.loads((folder / "generation_config.json").read_text())
    assert {name: saved[name] for name in settings} == settings


@pytest.mark.parametrize("method", ["awq", "gptq", "bitsandbytes", "fp8"])
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_quantised_checkpoint(copied, method, key):
    edit_json(copied / "config.json", **{key: {"quant_method": method, "bits": 4}})
    for check in (check_model_path, load):
        line = refusal(check, str(copied))
        assert f"its weights are quantised ({method}), which cannot be trained; give the original checkpoint" in line
