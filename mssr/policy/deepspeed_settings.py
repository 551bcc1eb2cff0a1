"""DeepSpeed settings of a run: the user's JSON for ZeRO, with the keys that the trainer sets itself."""

from typing import Any

import torch
from pydantic import ValidationError

from mssr.config.deepspeed_json import ZERO, read_deepspeed_json
from mssr.config.schema import OptimizerConfig, TrainConfig
from mssr.errors import UserError
from mssr.policy.sharding import PERSISTENT_NUMEL


def deepspeed_settings(optimizer: OptimizerConfig, train: TrainConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return the settings for `deepspeed.initialize` and `deepspeed.zero.Init`.

    dtype: of the parameters; for bfloat16 ZeRO's optimizer keeps float32 master weights.

    Raises:
        UserError: the JSON (`train.deepspeed`) is unreadable, or has an unsupported setting.
    """
    given = read_deepspeed_json(train.deepspeed) if train.deepspeed is not None else {}
    if given and given[ZERO]["stage"] != train.zero_stage:  # a TrainConfig by hand; `mssr.config.load` sets the stage
        raise UserError(f"{train.deepspeed} has stage {given[ZERO]['stage']}: set train.zero_stage to it")
    zero = {"stage": train.zero_stage, "overlap_comm": False}
    if train.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = PERSISTENT_NUMEL
    settings = {"steps_per_print": None} | given
    settings |= {
        # The trainer calls step() itself, after any number of backward passes.
        "managed_gradient_accumulation": False,
        "train_micro_batch_size_per_gpu": 1,
        # Without ZeRO, DeepSpeed clips float32 gradients but does not report the norm; there GuardedAdamW does both.
        "gradient_clipping": optimizer.grad_clip if train.zero_stage else 0.0,
        "bf16": {"enabled": dtype == torch.bfloat16},
        ZERO: zero | given.get(ZERO, {}),
        # torch's AdamW everywhere: DeepSpeed's own optimizers are compiled on first use.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if given:
        _check(settings, dtype, train.deepspeed)
    return settings


def _check(settings: dict[str, Any], dtype: torch.dtype, path: str) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # slow to import

    try:
        DeepSpeedZeroConfig(**settings[ZERO])
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, (ZERO, *first["loc"])))
        raise UserError(f"{path}: {key}: {first['msg']}; DeepSpeed's documentation has the keys") from None
    if settings[ZERO]["stage"] < 2 and settings[ZERO].get("overlap_comm"):
        raise UserError(f"{path}: {ZERO}.overlap_comm needs stage 2 or 3, where gradients are sharded; remove it")
    accumulates = (settings.get("data_types") or {}).get("grad_accum_dtype")
    if dtype == torch.bfloat16 and settings[ZERO]["stage"] == 1 and accumulates in ("fp32", "float32"):
        raise UserError(
            f"{path}: data_types.grad_accum_dtype fp32 at stage 1 is an optimizer of DeepSpeed's that checkpoints cannot "
            "read; set stage 2 or 3"
        )
