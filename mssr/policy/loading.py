"""The policy from a Hugging Face directory or hub name, whole on this rank."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText

from mssr.errors import UserError
from mssr.policy import attention
from mssr.policy.model import Policy


def load_policy(path: str, dtype: torch.dtype, *, gradient_checkpointing: bool = False) -> Policy:
    """Reads a Hugging Face directory or hub name.

    Raises:
        UserError: not a model, no vision tower, or weights that do not match the architecture.
    """
    check_model_path(path)
    try:
        model, loading = AutoModelForImageTextToText.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=attention.NAME,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, in one line
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"model.path {path}: {' '.join(str(error).split())[:300]}") from None
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading.get(problem):
            name = sorted(map(str, loading[problem]))[0]
            count = len(loading[problem])
            raise UserError(
                f"model.path {path}: {count} {problem.replace('_', ' ')}, the first {name}; is the file whole?"
            )
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return Policy(model)


def load_frozen_policy(path: str, dtype: torch.dtype, device: torch.device) -> Policy:
    """The model for inference alone, as a KL reference or to be evaluated: no gradients, no optimiser."""
    return load_policy(path, dtype).requires_grad_(False).eval().to(device)


def check_model_path(path: str) -> None:
    """Refuses a path that is no model before anything heavy starts."""
    if Path(path).exists() and not (Path(path) / "config.json").is_file():
        raise UserError(f"model.path {path}: no config.json in it; expected a Hugging Face model directory")
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path {path}: {' '.join(str(error).split())[:300]}") from None
    if getattr(config, "vision_config", None) is None or not hasattr(config, "image_token_id"):
        raise UserError(f"model.path {path}: {config.model_type} has no vision tower; expected a Qwen2.5-VL-like model")
