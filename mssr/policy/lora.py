"""LoRA: adapters on the language model's linear layers, trained in place of the weights.

An adapted layer gives W x + (alpha / rank) B A x. peft puts it where the linear layer was, so the model keeps its own
modules, for whoever walks through it: the policy, `generate`, ZeRO-3's hooks. A and B have the model's dtype, because
DeepSpeed knows one dtype for a model; in bfloat16 the optimizer keeps float32 masters of them, as of any weight. There is
no dropout, since the sampler has none. The sampler gets W + (alpha / rank) B A merged; in bfloat16 what is less than half a
unit of W's last place is rounded away there, so early on it samples from nearly the start: old log-probs are then the
trainer's own, with truncated importance weights (the configuration asks for it).
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mssr.config import LoraConfig
from mssr.errors import UserError
from mssr.policy.model import Policy

ADAPTER = "default"  # peft's name for a model's only adapter
_BASE = ".base_layer"  # peft's name for the linear layer inside of an adapted one
_PEFT_PREFIX = "base_model.model."  # before every name in peft's files


def add_adapters(policy: Policy, config: LoraConfig) -> None:
    """Adapters that change nothing yet (B is 0); all other parameters are frozen. A is the same on every rank and in every
    run.

    Raises:
        UserError: a target that names no linear layer of the language model.
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


def _pattern(language_model: str, targets: list[str]) -> str:
    """Regular expression for the whole names of the layers, as peft saves it too."""
    return rf"{re.escape(language_model)}\.(?:.*\.)?(?:{'|'.join(map(re.escape, targets))})"


def adapted_layers(policy: Policy) -> dict[str, nn.Module]:
    """The layers with an adapter by the name that the linear layer had; none without LoRA."""
    return {name: module for name, module in policy.model.named_modules() if hasattr(module, "lora_A")}


def own_name(name: str) -> str | None:
    """The name that a parameter has in the model without adapters; None for a part of an adapter."""
    return None if f".{ADAPTER}." in name else name.replace(f"{_BASE}.", ".")


def adapter_parts(layer: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    """A [rank, in] and B [out, rank]."""
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight


def merged(weight: Tensor, layer: nn.Module) -> Tensor:
    """[out, in], a copy in the weight's dtype: W + (alpha / rank) B A, computed in float32 and rounded once."""
    a, b = (part.detach().float() for part in adapter_parts(layer))
    return torch.addmm(weight.detach().float(), b, a, alpha=layer.scaling[ADAPTER]).to(weight.dtype)


@contextmanager
def without_adapters(policy: Policy) -> Iterator[None]:
    """In here the policy is the model that it started from; not to be trained in."""
    layers = adapted_layers(policy).values()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def write_adapter(policy: Policy, weights: dict[str, Tensor], folder: Path) -> None:
    """peft's directory, which `PeftModel.from_pretrained` puts on the model that the policy started from.

    weights: every part of the adapters, whole, by its parameter's name in `policy.model`.
    """
    folder.mkdir(parents=True)
    saved = {_PEFT_PREFIX + name.replace(f".{ADAPTER}.", "."): weight.contiguous() for name, weight in weights.items()}
    save_file(saved, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = policy.model.peft_config[ADAPTER]
    trained = settings.inference_mode
    settings.inference_mode = True
    settings.save_pretrained(folder)
    settings.inference_mode = trained
