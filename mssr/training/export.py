"""`mssr export`: a run's checkpoint as a Hugging Face directory, without ranks."""

from pathlib import Path

import torch
import yaml
from transformers import AutoConfig

from mssr.config import ModelConfig
from mssr.data.prompts import load_processors
from mssr.errors import UserError
from mssr.policy.export import adapter_weights, write_folder, write_model
from mssr.policy.loading import load_policy
from mssr.policy.lora import write_adapter
from mssr.policy.model import Policy
from mssr.policy.weights import BUCKET_BYTES, named_weights, untied_names
from mssr.training.checkpoint import FOLDER, read_weights, saved_steps


def export(
    run_dir: Path, out: Path, *, step: int | None = None, adapter: bool = False, dtype: str | None = None
) -> int:
    """Writes the policy of a checkpoint to `out`; returns the checkpoint's step.

    step: None for the newest.
    adapter: peft's directory for a run with model.lora; otherwise the whole model, adapters merged.
    dtype: of the weights, float32 or bfloat16; None for the run's, where that was auto the one of the model it started from.

    Raises:
        UserError: no run, no such checkpoint, nothing to export in it, or `out` is taken or cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: already there; name a new folder")
    file = run_dir / "config.yaml"
    if not file.is_file():
        raise UserError(f"{run_dir}: no config.yaml in it; expected the run_dir of a training run")
    options = ModelConfig.model_validate(yaml.safe_load(file.read_text())["model"])  # the rest may name files elsewhere
    if adapter and options.lora is None:
        raise UserError(f"--adapter: {file} has no model.lora; leave it out to export the whole model")
    step, folder = _checkpoint(run_dir, step)
    policy = _trained_policy(options, folder, dtype or options.dtype)

    out.parent.mkdir(parents=True, exist_ok=True)
    if adapter:
        write_folder(out, lambda partial: write_adapter(policy, adapter_weights(policy), partial))
    else:
        saved = untied_names(policy)
        weights = {name: weight for name, weight in named_weights(policy, BUCKET_BYTES) if name in saved}
        write_folder(out, lambda partial: write_model(policy, weights, load_processors(options.path), partial))
    return step


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
    """The policy that the run started from, with what it trained in place.

    Rounded like the trainer's own weights, so that a bfloat16 policy is exported as it was trained and sampled from.
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
