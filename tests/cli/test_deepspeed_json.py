"""`train.deepspeed`: what a user's DeepSpeed JSON may contain, and the one-line error for the rest."""

import json

import pytest

from mssr.config import validate_config
from mssr.config.deepspeed_json import read_deepspeed_json
from mssr.errors import UserError


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Write ds.json to the current directory. zero: keys of its ZeRO section, whose stage is 2 by default."""
    monkeypatch.chdir(tmp_path)

    def written(text: str | None = None, *, zero: dict | None = None, **sections) -> str:
        content = {"zero_optimization": {"stage": 2} | (zero or {})} | sections
        (tmp_path / "ds.json").write_text(json.dumps(content) if text is None else text)
        return "ds.json"

    return written


def config(path: str, *, rollout: dict | None = None, **train):
    return validate_config({
        "run_dir": "run", "model": {"path": "m"}, "data": {"train": "t"},
        "rollout": rollout or {}, "train": {"deepspeed": path} | train,
    })  # fmt: skip


def refusal(path: str, **settings) -> str:
    with pytest.raises(UserError) as error:
        config(path, **settings)
    (line,) = str(error.value).splitlines()
    assert path in line
    return line


HUGGING_FACE = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "steps_per_print": 2000,
    "wall_clock_breakdown": False,
}


def test_a_file_made_for_hugging_face_is_taken(written):
    zero = {
        "stage": 3, "overlap_comm": True, "reduce_bucket_size": "auto", "stage3_param_persistence_threshold": "auto",
        "offload_param": {"device": "cpu", "pin_memory": "auto"},
    }  # fmt: skip
    path = written(zero=zero, **HUGGING_FACE)
    assert read_deepspeed_json(path) == {
        "zero_optimization": {"stage": 3, "overlap_comm": True, "offload_param": {"device": "cpu"}},
        "steps_per_print": 2000,
        "wall_clock_breakdown": False,
    }
    assert config(path).train.zero_stage == 3


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_stage_is_the_files(written, stage):
    path = written(zero={"stage": stage})
    assert config(path).train.zero_stage == config(path, zero_stage=stage).train.zero_stage == stage


def test_what_a_run_writes_is_the_same_configuration(written):
    first = config(written(zero={"stage": 3}))
    assert validate_config(first.model_dump(mode="json")) == first


def test_another_stage_in_the_configuration_is_refused(written):
    line = refusal(written(zero={"stage": 3}), zero_stage=2)
    assert line == "train.zero_stage 2, but ds.json has stage 3; leave train.zero_stage out"


@pytest.mark.parametrize(
    "section, key",
    [
        ({"optimizer": {"type": "Lamb", "params": {"lr": "auto"}}}, "train.optimizer"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}, "train.optimizer"),
        ({"scheduler": {"type": "WarmupLR", "params": {}}}, "train.optimizer.schedule"),
        ({"train_batch_size": 64}, "train.responses_per_update"),
        ({"train_micro_batch_size_per_gpu": 4}, "train.micro_batch_tokens"),
        ({"gradient_accumulation_steps": 2}, "train.micro_batch_tokens"),
        ({"gradient_clipping": 1.0}, "train.optimizer.grad_clip"),
        ({"bf16": {"enabled": True}}, "model.dtype"),
        ({"fp16": {"enabled": True}}, "model.dtype"),
    ],
)
def test_what_the_trainer_owns_is_refused(written, section, key):
    (name,) = section
    line = refusal(written(**section))
    assert line == f'ds.json: {name} is set by the trainer: remove it or make it "auto", and set {key}'


def test_fp16_that_is_off_is_taken(written):
    assert config(written(fp16={"enabled": False})).train.zero_stage == 2


@pytest.mark.parametrize("section", ["curriculum_learning", "elasticity", "zero_optimisation"])
def test_what_nobody_would_read_is_refused(written, section):
    assert f"{section} is not used by the trainer" in refusal(written(**{section: {}}))


@pytest.mark.parametrize(
    "zero, words",
    [
        ({"stage": "3"}, "zero_optimization.stage must be 0, 1, 2 or 3"),
        ({"stage": "auto"}, "zero_optimization.stage must be"),
        ({"stage": True}, "zero_optimization.stage must be"),
        ({"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/x"}}, "offload_param.device must be"),
        ({"offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}, "offload_optimizer.device must be"),
        ({"offload_optimizer": "cpu"}, 'offload_optimizer must be a section, as {"device": "cpu"}'),
        ({"offload_param": {"device": "cpu"}}, "offload_param needs stage 3"),
        ({"cpu_offload": True}, 'use "offload_optimizer": {"device": "cpu"}'),
        ({"zenflow": {"topk_ratio": 0.1}}, "zenflow is not supported"),
        ({"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "super_offload and ratio"),
        ({"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}, "super_offload and ratio"),
    ],
)
def test_zero_settings_that_cannot_be_served(written, zero, words):
    assert words in refusal(written(zero=zero))


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "line 1, column 2: not valid JSON"),
        ("[]", "a list; expected"),
        ("{}", "zero_optimization.stage must be"),
        ('{"zero_optimization": 3}', "zero_optimization.stage must be"),
    ],
)
def test_a_file_that_is_no_settings(written, text, words):
    assert words in refusal(written(text))


def test_a_file_that_cannot_be_read(written, tmp_path):
    assert "none.json: no such file; paths start from the current directory" in refusal("none.json")
    assert "not readable: Is a directory" in refusal(str(tmp_path))


def test_the_optimizer_is_offloaded_once(written):
    path = written(zero={"offload_optimizer": {"device": "cpu"}})
    assert "set rollout.offload_optimizer=false" in refusal(path, rollout={"offload_optimizer": True})
    assert config(path).train.deepspeed == path
    none = written(zero={"offload_optimizer": {"device": "none"}})
    assert config(none, rollout={"offload_optimizer": True}).rollout.offload_optimizer
