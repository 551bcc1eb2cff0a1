"""`mssr export`: writes a run's checkpoint as a Hugging Face directory, in one process."""

from pathlib import Path

import torch
from pydantic import ValidationError
from transformers import AutoConfig

from mssr.config import Config
from mssr.config.load import read_keys
from mssr.config.presets import with_preset
from mssr.config.schema import ModelConfig
from mssr.data.processors import processors_to_save, with_pixel_limits
from mssr.data.prompts import load_processors
from mssr.distributed import ALONE
from mssr.errors import UserError
from mssr.policy.export import save_adapter, save_model
from mssr.policy.loading import load_policy
from mssr.policy.model import Policy
from mssr.training.checkpoint import FOLDER, read_weights, saved_steps


def export(
    run_dir: Path, out: Path, *, step: int | None = None, adapter: bool = False, dtype: str | None = None
) -> int:
    """Write the policy of a checkpoint to `out`; return the checkpoint's step.

    step: None for the newest.
    adapter: write only the adapter of a run with model.lora, as peft's directory; else the model with adapters merged.
    dtype: of the weights, float32 or bfloat16; None for the run's model.dtype, where auto is that of the initial model.

    Raises:
        UserError: no run, no such checkpoint, no adapter in it, or `out` exists or cannot be written.
    """
    out = out.resolve()  # the folder that a symlink names
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: already there; name a new folder")
    config = saved_config(run_dir)
    options = config.model
    if adapter and options.lora is None:
        raise UserError(f"--adapter: {run_dir}/config.yaml has no model.lora; leave it out to export the whole model")
    step, folder = _checkpoint(run_dir, step)
    policy = _trained_policy(options, folder, dtype or options.dtype)

    if adapter:
        save_adapter(policy, out, ALONE)
    else:
        tokenizer, images = load_processors(options.path)
        images = images and with_pixel_limits(images, config.data)
        save_model(policy, processors_to_save(options.path, tokenizer, images), out, ALONE)
    return step


def saved_config(run_dir: Path) -> Config:
    """Return a run's configuration, without the files that it names: they may be elsewhere.

    Raises:
        UserError: there is none, or it is damaged.
    """
    file = run_dir / "config.yaml"
    if not file.is_file():
        raise UserError(f"{run_dir}: no config.yaml in it; expected the run_dir of a training run")
    try:
        return Config.model_validate(with_preset({"run_dir": str(run_dir)} | read_keys(file, "config")))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise UserError(f"{file}: {where}: {problem['msg']}; restore what the run wrote") from None


def _checkpoint(run_dir: Path, step: int | None) -> tuple[int, Path]:
    steps = saved_steps(run_dir / FOLDER)
    if not steps:
        raise UserError(f"{run_dir / FOLDER}: no checkpoint in it; train first")
    if step is None:
        step = steps[-1]
    if step not in steps:
        raise UserError(
            f"--step {step}: {run_dir} has checkpoints of steps {', '.join(map(str, steps))}; name one of them"
        )
    return step, run_dir / FOLDER / f"step_{step:06d}"


@torch.no_grad()
def _trained_policy(options: ModelConfig, folder: Path, dtype: str) -> Policy:
    """Load the initial policy and copy the trained weights into it.

    The copy rounds like the trainer, so a bfloat16 policy is exported exactly as it was trained and sampled from.
    """
    if dtype == "auto":
        dtype = str(AutoConfig.from_pretrained(options.path).dtype or "float32").removeprefix("torch.")
    policy = load_policy(
        options.path, getattr(torch, dtype), options.model_copy(update={"liger": "off", "attention": "sdpa"})
    )
    parameters = dict(policy.model.named_parameters())
    for name, weight in read_weights(folder):
        if name not in parameters or parameters[name].shape != weight.shape:
            raise UserError(f"{folder}: trained {name} {list(weight.shape)}, which {options.path} does not have")
        parameters[name].copy_(weight)
    return policy
