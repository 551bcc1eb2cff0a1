"""Loads the policy from a Hugging Face directory or hub name, unsharded."""

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, PretrainedConfig

from mssr.config.schema import ModelConfig
from mssr.errors import UserError, shortened
from mssr.policy import attention
from mssr.policy.families import family_of, require_family, require_full_attention, require_original_weights
from mssr.policy.hub import require_model_folder_or_name
from mssr.policy.liger import replace_layers, wants_liger
from mssr.policy.lora import add_adapters
from mssr.policy.model import Policy

CPU = torch.device("cpu")


def load_policy(
    path: str, dtype: torch.dtype, options: ModelConfig | None = None, device: torch.device = CPU
) -> Policy:
    """Load a model into host memory.

    options: the run's; None trains the whole model.
    device: where it will run, which decides the available kernels; the caller moves it there.

    Raises:
        UserError: not a model of a supported family, weights that do not match it, or unsupported options.
    """
    config = check_model_path(path)
    try:
        model, loading = family_of(config).auto_class.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=attention.SDPA,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, in one line
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"model.path {path}: {shortened(error, 300)}") from None
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading.get(problem):
            name = sorted(map(str, loading[problem]))[0]
            count = len(loading[problem])
            raise UserError(
                f"model.path {path}: {count} {problem.replace('_', ' ')}, the first {name}; is the file complete?"
            )
    policy = Policy(model)
    apply_options(policy, options or ModelConfig(path=path), device)
    return policy


def load_frozen_policy(
    path: str, dtype: torch.dtype, device: torch.device, options: ModelConfig | None = None
) -> Policy:
    """Load the model for inference only, as KL reference or for evaluation, without adapters."""
    policy = load_policy(path, dtype, without_training(options), device)
    return policy.requires_grad_(False).eval().to(device)


def without_training(options: ModelConfig | None) -> ModelConfig | None:
    """Return the options that matter without training: no adapters, no gradient checkpointing."""
    return options and options.model_copy(update={"lora": None, "gradient_checkpointing": False})


def apply_options(policy: Policy, options: ModelConfig, device: torch.device) -> None:
    """Choose kernels and trained parameters; nothing here depends on the weights' values.

    Raises:
        UserError: options that the model or device does not support.
    """
    if options.gradient_checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    dtype = next(policy.parameters()).dtype
    policy.model.set_attn_implementation(attention.attention_name(options.attention, dtype, device))
    if wants_liger(options.liger, policy.model, device):
        replace_layers(policy.model)
    if not options.train_vision and policy.vision_tower is not None:
        policy.vision_tower.requires_grad_(False)
    if options.lora is not None:
        add_adapters(policy, options.lora)


def check_model_path(path: str) -> PretrainedConfig:
    """Return the config of a supported model, or refuse the path before anything slow starts."""
    require_model_folder_or_name(path)
    try:
        # First what the file says: transformers may not know the type, or lack what a quantised model needs.
        values = PretrainedConfig.get_config_dict(path)[0]
        require_family(path, values.get("model_type"))
        require_original_weights(path, values)
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path {path}: {shortened(error, 300)}") from None
    require_full_attention(path, config)
    return config
