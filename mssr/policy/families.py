"""What differs between the models that can be the policy: one entry a family, by the `model_type` of config.json.

All of them are a backbone (`model.model`), that ends in hidden states, and a head (`model.lm_head`). A new family of one
of the two kinds is a line in FAMILIES, and one that makes a tiny one in tiny.py where its config has other names: the
tests go through all entries.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig

from mssr.batch import Prompt
from mssr.errors import UserError
from mssr.policy.packing import MicroBatch


class Family(ABC):
    """How a model is built and called. Stateless: the model is an argument.

    auto_class: transformers' Auto class that reads its directory.
    has_vision: there is a tower, `model.model.visual`, that every training pass must run.
    """

    auto_class: type
    has_vision: bool

    @abstractmethod
    def inputs(self, micro_batch: MicroBatch) -> dict[str, Any]:
        """What the backbone is given besides token ids and attention."""

    @abstractmethod
    def prompt_positions(self, model: nn.Module, prompt: Prompt) -> Tensor:
        """[3, P] int64: temporal, height and width rotary positions of the prompt, by the model's own rule."""


class TextOnly(Family):
    """A causal language model; the three rotary positions are one and the same."""

    auto_class = AutoModelForCausalLM
    has_vision = False

    def inputs(self, micro_batch: MicroBatch) -> dict[str, Any]:
        return {"position_ids": micro_batch.position_ids[0]}

    def prompt_positions(self, model: nn.Module, prompt: Prompt) -> Tensor:
        return _counted(prompt)


class VisionLanguage(Family):
    """A language model that reads what a vision tower makes of images: Qwen's three-dimensional rotary positions."""

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
            return _counted(prompt)
        ids = prompt.token_ids[None]
        types = (ids == model.config.image_token_id).int()
        return model.model.get_rope_index(ids, types, prompt.image_grid_thw)[0][:, 0]

    def blank_image(self, model: nn.Module, like: Tensor) -> Tensor:
        """0-d: the sum of all that the vision tower makes of the smallest black image. like: gives dtype and device."""
        vision = model.config.vision_config
        side = vision.spatial_merge_size
        grid = torch.tensor([[1, side, side]], device=like.device)
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        out = model.model.visual(like.new_zeros(side * side, width), grid_thw=grid)
        # Qwen3-VL's tower also gives features of its middle layers, each through a merger with weights of its own.
        return sum((features.sum() for features in getattr(out, "deepstack_features", ())), out.pooler_output.sum())


FAMILIES: dict[str, Family] = {
    "llama": TextOnly(),
    "qwen2": TextOnly(),
    "qwen2_5_vl": VisionLanguage(),
    "qwen2_vl": VisionLanguage(),
    "qwen3": TextOnly(),
    "qwen3_vl": VisionLanguage(),
}


def family_of(config: PretrainedConfig) -> Family:
    """The family of a model that `require_family` let through."""
    return FAMILIES[config.model_type]


def require_family(path: str, model_type: str | None) -> None:
    """Raises:
    UserError: the model at `path` is of a type that is not in FAMILIES.
    """
    if model_type not in FAMILIES:
        raise UserError(
            f"model.path {path}: model_type {model_type} is not supported; these are: {', '.join(sorted(FAMILIES))}"
        )


def require_full_attention(path: str, config: PretrainedConfig) -> None:
    """Raises:
    UserError: layers of the model see a window of the sequence alone, which packed attention does not know.
    """
    kinds = getattr(config.get_text_config(), "layer_types", None) or ()
    other = next((kind for kind in kinds if kind != "full_attention"), None)
    if other is not None:
        raise UserError(
            f"model.path {path}: it has layers with {other}, which packing does not support; "
            "set use_sliding_window to false in its config.json if it was trained without"
        )


def _counted(prompt: Prompt) -> Tensor:
    """[3, P] int64: 0, 1, 2, ... three times, the positions of text."""
    return torch.arange(len(prompt.token_ids)).expand(3, -1)
