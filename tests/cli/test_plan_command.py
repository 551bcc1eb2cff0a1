"""`mssr plan`: its output, its exit code, and that following its advice works."""

import json

import pytest
from transformers import MistralConfig, Qwen2Config

from mssr.config import load_config
from mssr.errors import UserError
from mssr.planning.plan import plan_run
from mssr.policy.architectures import model_config
from mssr.stopwatch import GIB

MODEL = "Qwen/Qwen2.5-VL-7B-Instruct"


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("plan") / "run.yaml"
    file.write_text(
        f"run_dir: unused\nmodel: {{path: {MODEL}, gradient_checkpointing: true, reference: sharded}}\n"
        "data: {train: unused}\nrollout: {engine: vllm}\ntrain: {micro_batch_tokens: 16384}\n"
    )
    return file


def test_seven_billion_parameters_on_eight_gpus_of_80_gib(mssr, config_file):
    ended = mssr("plan", config_file, "--gpu", "h100", "--gpus", "8", "--json").check()
    found = json.loads(ended.out)
    assert found["fits"] and found["peak_gib"] <= found["device_gib"]
    memory = found["memory_gib"]["optimizer"]
    billions = 8.292166656e9  # bfloat16 weights are whole, float32 masters and two moments are sharded over 8 ranks
    assert found["parameters"] == billions
    assert memory["weights"] == pytest.approx(2 * billions / GIB, abs=0.1)
    assert memory["fp32 masters"] == pytest.approx(4 * billions / 8 / GIB, abs=0.1)
    assert memory["AdamW moments"] == pytest.approx(8 * billions / 8 / GIB, abs=0.1)
    assert sum(size for part, size in memory.items() if part != "total") == pytest.approx(memory["total"], abs=0.5)
    assert found["host_gib_per_rank"]["copy for saving"] == pytest.approx(12 * billions / 8 / GIB, abs=0.1)


def test_what_does_not_fit_ends_with_1_and_says_what_to_change(mssr, config_file, wide):
    changes = [wide, "model.gradient_checkpointing=false", "rollout.gpu_memory=0.3", "train.micro_batch_tokens=49152"]
    ended = mssr("plan", config_file, *changes, "--gpu", "rtx4090", "--gpus", "8", COLUMNS="100")
    assert ended.code == 1, ended.err
    assert "does not fit" in ended.out and "model.gradient_checkpointing=true" in ended.out
    assert "nothing was measured" in ended.out
    assert max(map(len, ended.out.splitlines())) <= 100


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Override for a model as wide as 7B with two text and two vision layers: large tensors, but planned quickly."""
    folder = tmp_path_factory.mktemp("wide")
    config = model_config(MODEL)
    config.text_config.num_hidden_layers = config.vision_config.depth = 2
    config.text_config.layer_types = config.text_config.layer_types[:2]
    config.save_pretrained(folder)
    return f"model.path={folder}"


def test_following_the_advice_makes_it_fit(config_file, wide):
    settings = [wide, "model.reference=copy", "train.zero_stage=1", "rollout.gpu_memory=0.3"]
    plan = plan_run(load_config(config_file, settings), "rtx4090", 4)
    assert not plan.fits and plan.advice.fits
    changed = plan_run(load_config(config_file, [*settings, *plan.advice.changes]), "rtx4090", 4)
    assert changed.fits
    assert changed.memory.peak == plan.advice.peak


@pytest.mark.parametrize(
    ("override", "phase"),
    [
        ("train.zero_stage=3", "optimizer"),
        ("model.lora.rank=16", "optimizer"),
        ("train.micro_batch_tokens=4096", "forward_backward"),
        ("rollout.offload_optimizer=true", "generate"),
    ],
)
def test_what_saves_memory_is_seen_to(config_file, wide, override, phase):
    common = [wide, "algorithm.old_logp=recompute"]  # 16-bit adapters require it
    before = plan_run(load_config(config_file, common), "h200", 8).memory
    after = plan_run(load_config(config_file, [*common, override]), "h200", 8).memory
    assert after.total(phase) < 0.98 * before.total(phase)


def test_mistakes_are_one_line(mssr, config_file):
    assert "--gpu tpu" in mssr("plan", config_file, "--gpu", "tpu").line
    assert "PROMPT,RESPONSE" in mssr("plan", config_file, "--context", "12").line


def test_text_models_have_no_images_and_other_architectures_are_refused(config_file, tmp_path):
    config = load_config(config_file, [f"model.path={tmp_path}"])
    Qwen2Config(num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="reads no images; leave out IMAGE: 300,500"):
        plan_run(config, "h100", 8, "300,500,100")
    MistralConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="model_type mistral is not supported"):
        plan_run(config, "h100", 8)


def test_longer_responses_take_more_time(config_file, wide):
    config = load_config(config_file, [wide])
    short, long = (plan_run(config, "h100", 8, context).time for context in ("512,256,300", "512,1024,300"))
    assert all(long.seconds[phase] >= short.seconds[phase] for phase in short.seconds)
    assert long.seconds["generate"] > 2 * short.seconds["generate"]


def test_wrong_context_is_refused(config_file, wide):
    with pytest.raises(UserError, match="the prompt includes the image"):
        plan_run(load_config(config_file, [wide]), "h100", 8, "100,200,300")
