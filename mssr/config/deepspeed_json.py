"""Reads and checks a user's DeepSpeed JSON. `policy.deepspeed_settings` turns it into the engine's settings."""

import json
from pathlib import Path
from typing import Any

from mssr.config.paths import expanded
from mssr.errors import UserError

AUTO = "auto"  # Hugging Face's word for what the trainer fills in
ZERO = "zero_optimization"

# Sections that the trainer fills in, and the keys that set them.
OWNED = {
    "optimizer": "train.optimizer",
    "scheduler": "train.optimizer.schedule",
    "train_batch_size": "train.responses_per_update",
    "train_micro_batch_size_per_gpu": "train.micro_batch_tokens",
    "gradient_accumulation_steps": "train.micro_batch_tokens",
    "gradient_clipping": "train.optimizer.grad_clip",
    "bf16": "model.dtype",
    "bfloat16": "model.dtype",
    "fp16": "model.dtype",
    "amp": "model.dtype",
}

# Sections that change speed, memory or logging; passed to DeepSpeed as they are.
USED = {
    ZERO, "activation_checkpointing", "comms_logger", "communication_data_type", "csv_monitor", "data_types",
    "dump_state", "flops_profiler", "gradient_predivide_factor", "memory_breakdown", "prescale_gradients",
    "steps_per_print", "tensorboard", "wall_clock_breakdown", "wandb", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
}  # fmt: skip

# Keys of ZeRO's section that are not supported, and what to do instead.
UNSUPPORTED = {
    "zenflow": "it has its own optimizer; use offload_optimizer",
    "cpu_offload": 'use "offload_optimizer": {"device": "cpu"}',
    "cpu_offload_param": 'use "offload_param": {"device": "cpu"}',
    "cpu_offload_use_pin_memory": "use pin_memory in offload_optimizer and offload_param",
}


def read_deepspeed_json(path: str) -> dict[str, Any]:
    """Return the file's sections without those that the trainer fills in, and without any "auto".

    path: relative to the current directory.

    Raises:
        UserError: missing, not JSON, without a ZeRO stage, or with a setting that the trainer owns or does not support.
    """
    sections = _read(path)
    for key, value in sections.items():
        if key in OWNED and not _left_to_trainer(key, value):
            raise UserError(f'{path}: {key} is set by the trainer: remove it or make it "auto", and set {OWNED[key]}')
        if key not in OWNED and key not in USED:
            raise UserError(f"{path}: {key} is not used by the trainer; remove it")
    settings = _without_auto({key: value for key, value in sections.items() if key in USED})
    _check_zero(settings.get(ZERO), path)
    return settings


def with_stage_of_json(values: dict[str, Any]) -> dict[str, Any]:
    """Return a run's values with `train.zero_stage` set to the stage in the file that `train.deepspeed` names.

    Raises:
        UserError: `train.zero_stage` is given and differs; or as `read_deepspeed_json`.
    """
    train = values.get("train")
    path = train.get("deepspeed") if isinstance(train, dict) else None
    if not isinstance(path, str):
        return values
    try:
        file = expanded(path)
    except ValueError:  # an empty path, of which the validation says more
        return values
    stage = read_deepspeed_json(file)[ZERO]["stage"]
    given = train.get("zero_stage", stage)
    if given != stage:
        raise UserError(f"train.zero_stage {given}, but {path} has stage {stage}; leave train.zero_stage out")
    return values | {"train": train | {"zero_stage": stage}}


def offloads_optimizer(path: str) -> bool:
    """Whether DeepSpeed itself keeps and steps the optimizer's state on the CPU."""
    return _device(read_deepspeed_json(path)[ZERO], "offload_optimizer") == "cpu"


def _read(path: str) -> dict[str, Any]:
    try:
        sections = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"train.deepspeed {path}: no such file; paths start from the current directory") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"train.deepspeed {path}: not readable: {getattr(error, 'strerror', None) or error}") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"train.deepspeed {path}, {place}: not valid JSON: {error.msg}") from None
    if not isinstance(sections, dict):
        raise UserError(f"train.deepspeed {path}: a {type(sections).__name__}; expected DeepSpeed's sections")
    return sections


def _left_to_trainer(key: str, value: Any) -> bool:
    """Whether it is "auto", as Hugging Face's files have it: bare, as `enabled`, or as every parameter of an AdamW."""
    if value == AUTO:
        return True
    if not isinstance(value, dict):
        return False
    if key == "optimizer":
        parameters = value.get("params", {})
        auto = isinstance(parameters, dict) and all(one == AUTO for one in parameters.values())
        return auto and value.get("type") == "AdamW" and value.keys() <= {"type", "params"}
    return value.get("enabled") == AUTO or (key in ("fp16", "amp") and value.get("enabled") is False)


def _without_auto(value: Any) -> Any:
    """Remove every "auto", so that DeepSpeed's own defaults apply."""
    if not isinstance(value, dict):
        return value
    return {key: _without_auto(part) for key, part in value.items() if part != AUTO}


def _check_zero(zero: Any, path: str) -> None:
    if not isinstance(zero, dict) or zero.get("stage") not in (0, 1, 2, 3) or isinstance(zero["stage"], bool):
        raise UserError(f"{path}: {ZERO}.stage must be 0, 1, 2 or 3")
    for key, remedy in UNSUPPORTED.items():
        if zero.get(key):
            raise UserError(f"{path}: {ZERO}.{key} is not supported: {remedy}")
    for section in ("offload_optimizer", "offload_param"):
        if not isinstance(zero.get(section) or {}, dict):
            raise UserError(f'{path}: {ZERO}.{section} must be a section, as {{"device": "cpu"}}')
        if _device(zero, section) not in ("none", "cpu"):
            raise UserError(
                f'{path}: {ZERO}.{section}.device must be "cpu" or "none": checkpoints read float32 weights and moments '
                "from memory, not from NVMe"
            )
    if _device(zero, "offload_param") == "cpu" and zero["stage"] != 3:
        raise UserError(f"{path}: {ZERO}.offload_param needs stage 3, which shards the weights; it has {zero['stage']}")
    optimizer = zero.get("offload_optimizer") or {}
    if optimizer.get("super_offload") or optimizer.get("ratio", 1.0) != 1.0:
        raise UserError(
            f"{path}: {ZERO}.offload_optimizer: super_offload and ratio have their own optimizers; remove them"
        )


def _device(zero: dict[str, Any], section: str) -> str:
    return (zero.get(section) or {}).get("device", "none")
