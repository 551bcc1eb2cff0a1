"""Floating-point operations of a policy's passes, from its weights and its inputs.

Counts matrix products only, two operations per multiply-add; norms, activations and rotary positions are below 1 %.
Causal attention counts the half of its scores that are used, whatever a kernel computes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_window_index

from mssr.policy.model import Policy
from mssr.policy.weights import whole_shape


@dataclass(frozen=True)
class Flops:
    """FLOPs of a forward pass, and of its backward pass: gradients of inputs and of trained weights.

    recomputed: of the second forward pass with gradient checkpointing. They are not model FLOPs, so not in the MFU.
    """

    forward: float
    backward: float = 0.0
    recomputed: float = 0.0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


def policy_flops(
    policy: Policy, lengths: Sequence[int], head_tokens: int, grids: Sequence[Sequence[int]] = ()
) -> Flops:
    """Count the passes over packed sequences.

    lengths: tokens of each sequence, prompt and response. head_tokens: tokens whose logits are computed.
    grids: (frames, height, width) of each image in patches: `image_grid_thw`.
    """
    layers = policy.language_model.layers
    queries = policy.model.config.get_text_config().num_attention_heads * layers[0].self_attn.head_dim
    pairs = len(layers) * sum(length * length for length in lengths) / 2
    language = _layers(layers, sum(lengths), queries * pairs) + _products([policy.model.lm_head], head_tokens)
    return language + _vision(policy, torch.tensor(grids)) if grids else language


def _vision(policy: Policy, grids: Tensor) -> Flops:
    tower, config = policy.vision_tower, policy.model.config.vision_config
    patches, width = int(grids.prod(1).sum()), whole_shape(tower.patch_embed.proj.weight)[0]
    whole = get_vision_cu_seqlens(grids)
    attended = [whole for _ in tower.blocks]
    if hasattr(config, "fullatt_block_indexes"):  # the other blocks attend within windows
        _, windows = get_vision_window_index(grids, policy.merge_size, config.window_size, config.patch_size)
        attended = [whole if each in config.fullatt_block_indexes else windows for each in range(len(attended))]
    pairs = sum(float(boundaries.diff().double().square().sum()) for boundaries in attended)
    mergers = [tower.merger, *getattr(tower, "deepstack_merger_list", ())]
    pixels = _products([tower.patch_embed], patches)
    found = pixels + _layers(tower.blocks, patches, width * pairs) + _products(mergers, patches // policy.merge_size**2)
    if any(weight.requires_grad for weight in tower.parameters()):
        return found + Flops(0.0, backward=-pixels.forward)  # pixels need no gradient
    return Flops(found.forward)


def _layers(layers: nn.ModuleList, rows: int, scores: float) -> Flops:
    """Count layers of attention and MLP. scores: multiply-adds of queries and keys, in all layers.

    Gradient checkpointing does not repeat a layer's last product: the backward pass needs only its inputs.
    """
    linear = _products(layers, rows)
    last = [[module for module in layer.modules() if isinstance(module, nn.Linear)][-1] for layer in layers]
    attention = 4 * scores  # the scores, and their product with the values
    recomputed = linear.forward + attention - _products(last, rows).forward
    return Flops(linear.forward + attention, linear.backward + 2 * attention, recomputed)


def _products(modules: Iterable[nn.Module], rows: int) -> Flops:
    """Count the products of `rows` inputs, which need gradients, with all weight matrices of the modules."""
    weights = [weight for module in modules for weight in module.parameters() if len(whole_shape(weight)) > 1]
    forward = 2.0 * rows * sum(whole_shape(weight).numel() for weight in weights)
    trained = 2.0 * rows * sum(whole_shape(weight).numel() for weight in weights if weight.requires_grad)
    return Flops(forward, forward + trained)
