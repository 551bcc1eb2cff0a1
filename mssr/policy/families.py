"""What differs between the supported models, by the `model_type` of config.json.

Every model is a backbone (`model.model`), which returns hidden states, and a head (`model.lm_head`). A new model of one of
the two families is a line in FAMILIES; the tests go through all entries.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig

from mssr.batch import Prompt
from mssr.errors import UserError
from mssr.policy.packing import MicroBatch


class Family:
    """A causal language model that reads text; `VisionLanguage` adds images. Stateless: the model is an argument.

    auto_class: transformers' Auto class that loads it.
    has_vision: there is a tower, `model.model.visual`, that every training pass must run.
    """

    auto_class: type = AutoModelForCausalLM
    has_vision = False

    def inputs(self, micro_batch: MicroBatch) -> dict[str, Any]:
        """Return the backbone's arguments besides token ids and attention."""
        return {"position_ids": micro_batch.position_ids[0]}

    def prompt_positions(self, model: nn.Module, prompt: Prompt) -> Tensor:
        """Return the temporal, height and width rotary positions of the prompt, [3, P] int64; all equal for text."""
        return torch.arange(len(prompt.token_ids)).expand(3, -1)


class VisionLanguage(Family):
    """A language model with a vision tower and Qwen's three-dimensional rotary positions."""

    auto_class = AutoModelForImageTextToText
    has_vision = True

    def inputs(self, micro_batch: MicroBatch) -> dict[str, Any]:
        return {
            "position_ids": micro_batch.position_ids,
            "mm_token_type_ids": micro_batch.mm_token_type_ids,
            "pixel_values": micro_batch.pixel_values,
            "image_grid_thw": micro_batch.image_grid_thw,
        }

    def prompt_positions(self, model: nn.Module, prompt: Prompt) -> Tensor:
        if prompt.image_grid_thw is None:
            return super().prompt_positions(model, prompt)
        ids = prompt.token_ids[None]
        types = (ids == model.config.image_token_id).int()
        return model.model.get_rope_index(ids, types, prompt.image_grid_thw)[0][:, 0]

    def blank_image(self, model: nn.Module, like: Tensor) -> Tensor:
        """Return the sum of all outputs of the vision tower for the smallest blank image, 0-d. like: gives dtype, device."""
        vision = model.config.vision_config
        side = vision.spatial_merge_size
        grid = torch.tensor([[1, side, side]], device=like.device)
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        out = model.model.visual(like.new_zeros(side * side, width), grid_thw=grid)
        # Qwen3-VL's tower also returns features of its middle layers, each through its own merger.
        return sum((features.sum() for features in getattr(out, "deepstack_features", ())), out.pooler_output.sum())


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "qwen2": Family(),
    "qwen2_5_vl": VisionLanguage(),
    "qwen2_vl": VisionLanguage(),
    "qwen3": Family(),
    "qwen3_vl": VisionLanguage(),
}


def family_of(config: PretrainedConfig) -> Family:
    """Return the family of a model that passed `require_family`."""
    return FAMILIES[config.model_type]


def require_family(path: str, model_type: str | None) -> None:
    """Refuse a model type that is not in FAMILIES.

    Raises:
        UserError: naming the types that are.
    """
    if model_type not in FAMILIES:
        raise UserError(
            f"model.path {path}: model_type {model_type} is not supported; these are: "
            f"{', '.join(sorted(FAMILIES))}. For most others use the loss: mssr_kernels.patch(model) in a trainer of your "
            "own, or the trainers of mssr.integrations.trl"
        )


def require_original_weights(path: str, config: dict[str, Any]) -> None:
    """Refuse a quantised checkpoint (AWQ, GPTQ, bitsandbytes, FP8): its rounded weights cannot be trained.

    config: the contents of config.json.

    Raises:
        UserError: naming the method.
    """
    found = config.get("quantization_config") or config.get("compression_config")
    if found:
        method = found.get("quant_method") or "quantization_config in config.json"
        raise UserError(
            f"model.path {path}: its weights are quantised ({method}), which cannot be trained; give the original "
            "checkpoint in bfloat16 or float32 (to sample faster: rollout.quantization)"
        )


def require_full_attention(path: str, config: PretrainedConfig) -> None:
    """Refuse layers with sliding-window attention, which packed attention does not implement.

    Raises:
        UserError: the model has such layers.
    """
    kinds = getattr(config.get_text_config(), "layer_types", None) or ()
    other = next((kind for kind in kinds if kind != "full_attention"), None)
    if other is not None:
        raise UserError(
            f"model.path {path}: it has layers with {other}, which packing does not support; "
            "set use_sliding_window to false in its config.json if it was trained without"
        )
