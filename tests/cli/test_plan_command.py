"""`mssr plan`: its output, its exit code, and that following its advice works."""

import json
from pathlib import Path

import pytest
from transformers import MistralConfig, Qwen2Config
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mssr.config import load_config
from mssr.config.conflicts import refuse_conflicts
from mssr.errors import UserError
from mssr.planning.advice import advise
from mssr.planning.memory import Memory
from mssr.planning.plan import plan_run
from mssr.planning.workload import Workload, with_own_pixel_limits
from mssr.policy.architectures import model_config
from mssr.stopwatch import GIB

ROOT = Path(__file__).parents[2]
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
    assert found["step_seconds_estimate"]["total"] > 0 and found["concurrent_responses"] > 0
    memory = found["memory_gib"]["optimizer"]
    billions = 8.292166656e9  # bfloat16 weights are whole, float32 masters and two moments are sharded over 8 ranks
    assert found["parameters"] == billions
    assert memory["weights"] == pytest.approx(2 * billions / GIB, abs=0.1)
    assert memory["fp32 masters"] == pytest.approx(4 * billions / 8 / GIB, abs=0.1)
    assert memory["AdamW moments"] == pytest.approx(8 * billions / 8 / GIB, abs=0.1)
    assert sum(size for part, size in memory.items() if part != "total") == pytest.approx(memory["total"], abs=0.5)
    assert any(note.startswith("host memory: without rows of data.train") for note in found["assumptions"])
    assert found["host_gib_per_rank"]["copy for saving"] == pytest.approx(12 * billions / 8 / GIB, abs=0.1)


def test_what_does_not_fit_ends_with_1_and_says_what_to_change(mssr, config_file, wide):
    changes = [wide, "model.gradient_checkpointing=false", "rollout.gpu_memory=0.3", "train.micro_batch_tokens=49152"]
    ended = mssr("plan", config_file, *changes, "--gpu", "rtx4090", "--gpus", "8", COLUMNS="100")
    assert ended.code == 1, ended.err
    assert "does not fit" in ended.out and "model.gradient_checkpointing=true" in ended.out
    assert "Seconds per step" not in ended.out and "bandwidth" not in ended.out  # it could not take a step
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


@pytest.mark.slow("22 s: the shipped 7B configuration at full size; what is tried is checked below")
def test_seven_billion_parameters_on_eight_gpus_of_48_gib(monkeypatch):
    monkeypatch.chdir(ROOT)
    shipped = ROOT / "configs" / "qwen2_5_vl_7b.yaml"
    plan = plan_run(load_config(shipped), "l40s", 8)
    assert not plan.fits and plan.advice.fits and plan.time is None
    assert plan.advice.changes == ("train.zero_stage=3", "train.deepspeed=configs/deepspeed/zero3.json")
    assert plan_run(load_config(shipped, plan.advice.changes), "l40s", 8).fits


def advised(file, overrides: list[str], helps, ranks: int = 8) -> tuple[str, ...]:
    """Return the advice where only what `helps(config)` makes the run fit. Following it gives a configuration that helps."""

    def predict(config) -> Memory:
        return Memory({"generate": {"weights": 10 if helps(config) else 90}}, {}, None)

    changes = advise(load_config(file, overrides), predict, 50, ranks).changes
    assert helps(load_config(file, [*overrides, *changes]))
    return changes


def test_where_a_deepspeed_json_is_set_another_one_is_tried(config_file, monkeypatch):
    monkeypatch.chdir(ROOT)
    json_2 = ["train.deepspeed=configs/deepspeed/zero2.json"]
    json_3 = ("train.zero_stage=3", "train.deepspeed=configs/deepspeed/zero3.json")
    assert advised(config_file, json_2, lambda config: config.train.zero_stage == 3) == json_3
    assert advised(config_file, json_2, lambda config: config.rollout.offload_optimizer) == (
        "rollout.offload_optimizer=true",
    )
    offloading = "train.deepspeed=configs/deepspeed/zero3_offload.json"
    for given in (json_2, ["train.deepspeed=configs/deepspeed/zero3.json"]):
        assert offloading in advised(config_file, given, lambda config: "offload" in (config.train.deepspeed or ""))


def test_where_no_other_json_is_there_the_stage_is_set_without_one(config_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.json").write_text('{"zero_optimization": {"stage": 1}}')
    changes = advised(config_file, ["train.deepspeed=mine.json"], lambda config: config.train.zero_stage == 3)
    assert changes == ("train.zero_stage=3", "train.deepspeed=null")


def test_adapters_are_advised_with_the_correction_that_they_need(config_file):
    """`preset: paper` has none: without it the advice would be refused on a GPU."""
    changes = advised(config_file, ["preset=paper"], lambda config: config.model.lora is not None)
    refuse_conflicts(load_config(config_file, ["preset=paper", *changes]), "cuda")


def test_what_the_planned_gpu_would_refuse_is_refused_here(config_file):
    config = load_config(config_file, ["model.lora.rank=8"])  # fine on this machine, which has no GPU
    with pytest.raises(UserError, match="on h100: model.lora with model.dtype auto"):
        plan_run(config, "h100", 8)


def test_an_image_is_as_large_as_the_models_own_limit(config_file, tmp_path):
    """28 x 28 pixels are a token; the published limit of Qwen2.5-VL is 16,384 of them."""
    model = model_config(MODEL)

    def image(*settings: str) -> int:
        config = load_config(config_file, ["data.max_prompt_tokens=40000", *settings])
        return Workload.longest(with_own_pixel_limits(config, model), model).image

    assert image() == 16_384
    assert image("data.max_pixels=784000") == 1000
    folder = f"model.path={tmp_path}"
    assert image(folder) == 36_000  # it has no image processor: only the prompt is a limit
    Qwen2VLImageProcessorPil(max_pixels=1_568_000).save_pretrained(tmp_path)
    assert image(folder) == 2000
    with pytest.raises(UserError, match="larger than the model's own max_pixels 1568000"):
        image(folder, "data.min_pixels=2000000")


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
