"""Replaces transformers' RMSNorm, SwiGLU and rotary positions by liger-kernel's Triton kernels; the head stays MSSR's."""

import os
import sys
from collections import Counter
from functools import cache
from importlib.util import find_spec

import torch
from torch import nn

from mssr.errors import UserError

# transformers >= 5.2 splits the rotary sections before attention and rotates inside with the plain function. liger
# replaces only the function that did both, which is no longer called.
_PLAIN_ROTARY = ("qwen2_vl", "qwen2_5_vl")


def wants_liger(setting: str, model: nn.Module, device: torch.device) -> bool:
    """Return whether to replace the layers. setting: auto, on or off.

    Raises:
        UserError: on is set, and they cannot be replaced.
    """
    if setting == "off":
        return False
    problem = _problem(model, device)
    if problem and setting == "on":
        raise UserError(f"model.liger on: {problem}, or set model.liger=auto")
    return problem is None


def _problem(model: nn.Module, device: torch.device) -> str | None:
    """Return why the layers cannot be replaced and what to do, or None."""
    if device.type != "cuda":
        return "its kernels need a GPU; run on one"
    if find_spec("liger_kernel") is None:
        return "liger-kernel is not installed; pip install 'mssr[liger]'"
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return f"liger-kernel has no layers for {model.config.model_type}; take another model"
    return None


def replace_layers(model: nn.Module) -> None:
    """Replace the layers that liger has for this model, and print them once on rank 0.

    Names and parameters stay. Layers are replaced in this model only, the rotary function in transformers' module, and so
    for every model of the type in this process.
    """
    from liger_kernel.transformers import _apply_liger_kernel_to_instance, liger_rotary_pos_emb

    modeling = vars(sys.modules[type(model).__module__])
    classes = {name: value for name, value in modeling.items() if isinstance(value, type)}
    _apply_liger_kernel_to_instance(
        model=model, rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False
    )
    modeling.update(classes)  # liger also replaces the classes of future models; undo that
    if model.config.model_type in _PLAIN_ROTARY:
        modeling["apply_rotary_pos_emb"] = liger_rotary_pos_emb
    layers = Counter(module._get_name() for module in model.modules() if module._get_name().startswith("Liger"))
    _say_once(", ".join(f"{count} {name}" for name, count in sorted(layers.items())))


@cache
def _say_once(layers: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"model.liger: liger-kernel computes {layers} and the rotary positions", flush=True)
