"""liger-kernel's layers in place of transformers': RMSNorm, SwiGLU and rotary positions as one Triton kernel each.

Its losses and its forward of the model stay out: the head is ours.
"""

import os
import sys
from collections import Counter
from functools import cache
from importlib.util import find_spec

import torch
from torch import nn

from mssr.errors import UserError

# transformers >= 5.2 rotates by sections before the attention is called, and plainly inside; liger still replaces the
# function that did both, which nobody calls any more.
_PLAIN_ROTARY = ("qwen2_vl", "qwen2_5_vl")


def wants_liger(setting: str, model: nn.Module, device: torch.device) -> bool:
    """Whether the layers are to be replaced. setting: auto, on or off.

    Raises:
        UserError: they must be, and cannot.
    """
    if setting == "off":
        return False
    problem = _problem(model, device)
    if problem and setting == "on":
        raise UserError(f"model.liger on: {problem}, or set model.liger=auto")
    return problem is None


def _problem(model: nn.Module, device: torch.device) -> str | None:
    """Why the layers cannot be replaced, and what to do."""
    if device.type != "cuda":
        return "its kernels need a GPU; run on one"
    if find_spec("liger_kernel") is None:
        return "liger-kernel is not installed; pip install 'mssr[liger]'"
    if not _known(model):
        return f"liger-kernel has no layers for {model.config.model_type}; take another model"
    return None


def _known(model: nn.Module) -> bool:
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    return model.config.model_type in MODEL_TYPE_TO_APPLY_LIGER_FN


def replace_layers(model: nn.Module) -> None:
    """Replaces what liger has for this model, and says on rank 0, once, what that was.

    Names and parameters stay. The rotary function is replaced in transformers' module, and so for every model of the
    family in this process; the layers in this model alone.
    """
    from liger_kernel.transformers import _apply_liger_kernel_to_instance, liger_rotary_pos_emb

    modeling = vars(sys.modules[type(model).__module__])
    classes = {name: value for name, value in modeling.items() if isinstance(value, type)}
    _apply_liger_kernel_to_instance(
        model=model, rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False
    )
    modeling.update(classes)  # liger puts its own there, for models that are yet to be built
    if model.config.model_type in _PLAIN_ROTARY:
        modeling["apply_rotary_pos_emb"] = liger_rotary_pos_emb
    layers = Counter(module._get_name() for module in model.modules() if module._get_name().startswith("Liger"))
    _say_once(", ".join(f"{count} {name}" for name, count in sorted(layers.items())))


@cache
def _say_once(layers: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"model.liger: liger-kernel computes {layers} and the rotary positions", flush=True)
