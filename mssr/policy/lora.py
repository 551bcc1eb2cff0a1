"""LoRA: trains adapters on the language model's linear layers instead of the weights.

An adapted layer computes W x + (alpha / rank) B A x. peft replaces only the linear layers, so the model keeps its module
structure for the policy, `generate` and ZeRO-3's hooks. A and B have the model's dtype, because DeepSpeed supports one dtype
per model; in bfloat16 the optimizer keeps float32 masters of them. There is no dropout, because the sampler has none.
The sampler gets W + (alpha / rank) B A merged. In bfloat16 the merge rounds away changes below half a unit in W's last
place, so early on the sampler is close to the initial policy. Therefore the configuration requires recomputed old
log-probs, with truncated importance weights.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mssr.config.schema import LoraConfig
from mssr.errors import UserError
from mssr.policy.model import Policy

ADAPTER = "default"  # peft's name for a model's only adapter
_BASE = ".base_layer"  # peft's name for the linear layer inside an adapted one
_PEFT_PREFIX = "base_model.model."  # before every name in peft's files


def add_adapters(policy: Policy, config: LoraConfig) -> None:
    """Add adapters with B = 0 and freeze all other parameters. A is the same on every rank and in every run.

    Raises:
        UserError: a target is not the name of a linear layer of the language model.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    model = policy.model
    names = {module: name for name, module in model.named_modules()}
    language_model = names[policy.language_model]
    linear = [name for module, name in names.items() if isinstance(module, nn.Linear)]
    for target in config.targets:
        if not any(re.fullmatch(_pattern(language_model, [target]), name) for name in linear):
            own = sorted({name.rpartition(".")[2] for name in linear if name.startswith(language_model + ".")})
            raise UserError(
                f"model.lora.targets: {target} is no linear layer of the language model; it has {', '.join(own)}"
            )
    settings = PeftConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=_pattern(language_model, config.targets),
        lora_dropout=0.0,
        base_model_name_or_path=model.name_or_path,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        inject_adapter_in_model(settings, model, ADAPTER)
    if (
        model.is_gradient_checkpointing
    ):  # peft then makes inputs require gradients, which would run back through the tower
        model.disable_input_require_grads()


def _pattern(language_model: str, targets: list[str]) -> str:
    """Return a regular expression for the full names of the layers; peft saves it too."""
    return rf"{re.escape(language_model)}\.(?:.*\.)?(?:{'|'.join(map(re.escape, targets))})"


def adapted_layers(policy: Policy) -> dict[str, nn.Module]:
    """Return the layers with an adapter by the name of the original linear layer; empty without LoRA."""
    return {name: module for name, module in policy.model.named_modules() if hasattr(module, "lora_A")}


def own_name(name: str) -> str | None:
    """Return a parameter's name in the model without adapters; None for a part of an adapter."""
    return None if f".{ADAPTER}." in name else name.replace(f"{_BASE}.", ".")


def adapter_parts(layer: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    """Return A [rank, in] and B [out, rank]."""
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight


def merged(weight: Tensor, layer: nn.Module) -> Tensor:
    """Return W + (alpha / rank) B A, [out, in], computed in float32 and rounded once to the weight's dtype."""
    a, b = (part.detach().float() for part in adapter_parts(layer))
    return torch.addmm(weight.detach().float(), b, a, alpha=layer.scaling[ADAPTER]).to(weight.dtype)


@contextmanager
def without_adapters(policy: Policy) -> Iterator[None]:
    """Context in which the policy is the initial model; do not train in it."""
    layers = adapted_layers(policy).values()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def write_adapter(policy: Policy, weights: dict[str, Tensor], folder: Path) -> None:
    """Write peft's directory, which `PeftModel.from_pretrained` adds to the initial model.

    weights: unsharded adapter parameters by their names in `policy.model`.
    """
    folder.mkdir(parents=True)
    saved = {_PEFT_PREFIX + name.replace(f".{ADAPTER}.", "."): weight.contiguous() for name, weight in weights.items()}
    save_file(saved, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = policy.model.peft_config[ADAPTER]
    trained = settings.inference_mode
    settings.inference_mode = True
    settings.save_pretrained(folder)
    settings.inference_mode = trained
