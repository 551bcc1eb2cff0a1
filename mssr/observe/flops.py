"""Floating-point operations of a model's forward and backward pass, from its configuration and its inputs.

Counts matrix products only, two operations per multiply-add; norms, activations and rotary positions are below 1 %.
Causal attention counts the half of its scores that are used, whatever a kernel computes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig

VISION_TOWERS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
TEXT_MODELS = ("qwen2", "qwen3", "llama")


@dataclass(frozen=True)
class Flops:
    """FLOPs of one forward pass.

    text: linear layers of the decoder. attention: its scores and their products with the values. head: LM head.
    vision: blocks of the vision tower, with their attention. patches: patch embedding. mergers: to the text's width.
    text_last, vision_last: the last product of each layer, which text and vision include.
    """

    text: float = 0.0
    attention: float = 0.0
    head: float = 0.0
    vision: float = 0.0
    patches: float = 0.0
    mergers: float = 0.0
    text_last: float = 0.0
    vision_last: float = 0.0

    @property
    def forward(self) -> float:
        return self.text + self.attention + self.head + self.vision + self.patches + self.mergers

    def backward(self, *, train_vision: bool = True, lora: bool = False) -> float:
        """FLOPs of the gradients of inputs and of trained weights; pixels need no gradient."""
        weights = 0.0 if lora else 1.0
        language = 2 * self.attention + (1 + weights) * (self.text + self.head)
        if lora or not train_vision:
            return language
        return language + 2 * (self.vision + self.mergers) + self.patches

    def recomputed(self, *, train_vision: bool = True, lora: bool = False) -> float:
        """FLOPs of the second forward pass with gradient checkpointing. They are not model FLOPs, so not in the MFU.

        A layer's last product is not recomputed: the backward pass needs only its inputs.
        """
        text = self.text - self.text_last + self.attention
        return text if lora or not train_vision else text + self.vision - self.vision_last

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


def countable(config: PretrainedConfig) -> bool:
    """Whether `forward_flops` knows the architecture; for others no FLOPs are reported."""
    return config.model_type in (*VISION_TOWERS, *TEXT_MODELS)


def forward_flops(
    config: PretrainedConfig, lengths: Sequence[int], head_tokens: int, grids: Iterable[Sequence[int]] = ()
) -> Flops:
    """Count one forward pass over packed sequences.

    lengths: tokens of each sequence, prompt and response. head_tokens: tokens whose logits are computed.
    grids: (frames, height, width) of each image in patches: `image_grid_thw`.

    Raises:
        ValueError: the architecture is unknown.
    """
    if not countable(config):
        raise ValueError(f"the FLOPs of {config.model_type} are unknown; known are {VISION_TOWERS} and {TEXT_MODELS}")
    text = config.get_text_config()
    width, layers = text.hidden_size, text.num_hidden_layers
    head_dim = getattr(text, "head_dim", None) or width // text.num_attention_heads
    queries, keys = text.num_attention_heads * head_dim, text.num_key_value_heads * head_dim
    projections = width * (queries + 2 * keys) + queries * width
    linear = projections + 3 * width * text.intermediate_size
    squares = sum(length * length for length in lengths)
    return Flops(
        text=2.0 * layers * linear * sum(lengths),
        attention=2.0 * layers * queries * squares,  # two products, 2 operations each, half of them used
        head=2.0 * width * text.vocab_size * head_tokens,
        text_last=2.0 * layers * width * text.intermediate_size * sum(lengths),
        **_vision(config.vision_config, config.model_type, grids) if config.model_type in VISION_TOWERS else {},
    )


def _vision(vision: PretrainedConfig, model_type: str, grids: Iterable[Sequence[int]]) -> dict[str, float]:
    width = vision.embed_dim if model_type == "qwen2_vl" else vision.hidden_size
    out = vision.hidden_size if model_type == "qwen2_vl" else vision.out_hidden_size
    inner = int(width * vision.mlp_ratio) if model_type == "qwen2_vl" else vision.intermediate_size
    mlp = (3 if model_type == "qwen2_5_vl" else 2) * width * inner
    merge, mergers = vision.spatial_merge_size**2, 1
    full_blocks = vision.depth
    if model_type == "qwen2_5_vl":
        full_blocks = len(vision.fullatt_block_indexes)
    if model_type == "qwen3_vl":
        mergers += len(vision.deepstack_visual_indexes)
    grids = [tuple(map(int, grid)) for grid in grids]
    patches = sum(frames * height * columns for frames, height, columns in grids)
    full = sum(frames * (height * columns) ** 2 for frames, height, columns in grids)
    windowed = sum(_window_squares(grid, vision) for grid in grids) if full_blocks < vision.depth else 0
    inputs = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    merged = width * merge
    linear = 4 * width * width + mlp
    return {
        "vision": 2.0 * vision.depth * linear * patches
        + 4.0 * width * (full_blocks * full + (vision.depth - full_blocks) * windowed),
        "vision_last": 2.0 * vision.depth * width * inner * patches,
        "patches": 2.0 * inputs * width * patches,
        "mergers": 2.0 * mergers * merged * (merged + out) * (patches // merge),
    }


def _window_squares(grid: Sequence[int], vision: PretrainedConfig) -> int:
    """Sum of squared patch counts over Qwen2.5-VL's attention windows, which are smaller at the edges."""
    frames, height, columns = grid
    side = vision.spatial_merge_size
    window = vision.window_size // side // vision.patch_size

    def squares(patches: int) -> int:
        whole, rest = divmod(patches // side, window)
        return (whole * window * window + rest * rest) * side * side

    return frames * squares(height) * squares(columns)
