"""FLOPs by formula, compared with torch's count while real models run."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from mssr.observe.flops import Flops, countable, forward_flops

TEXT = {
    "vocab_size": 500, "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}}
TOKENS = {"image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6}
GRIDS = [(1, 20, 12), (1, 6, 4)]  # windows of 8 x 8 patches, and smaller ones at the edges


def qwen2_vl():
    vision = {"depth": 2, "embed_dim": 96, "hidden_size": 128, "num_heads": 4, "mlp_ratio": 3}
    return Qwen2VLForConditionalGeneration, Qwen2VLConfig(text_config=TEXT | ROPE, vision_config=vision, **TOKENS)


def qwen2_5_vl():
    vision = {
        "depth": 3, "hidden_size": 96, "intermediate_size": 200, "out_hidden_size": 128, "num_heads": 4,
        "fullatt_block_indexes": [1],
    }  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=TEXT | ROPE, vision_config=vision, **TOKENS)
    return Qwen2_5_VLForConditionalGeneration, config


def qwen3_vl():
    vision = {
        "depth": 3, "hidden_size": 96, "intermediate_size": 200, "out_hidden_size": 128, "num_heads": 4,
        "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    text = TEXT | {"head_dim": 48, "rope_parameters": ROPE["rope_parameters"] | {"mrope_section": [8, 8, 8]}}
    return Qwen3VLForConditionalGeneration, Qwen3VLConfig(text_config=text, vision_config=vision, **TOKENS)


FAMILIES = {
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "qwen2": lambda: (Qwen2ForCausalLM, Qwen2Config(**TEXT)),
    "qwen3": lambda: (Qwen3ForCausalLM, Qwen3Config(**TEXT, head_dim=48)),
    "llama": lambda: (LlamaForCausalLM, LlamaConfig(**TEXT)),
}


def inputs(config, length: int) -> dict:
    ids = torch.full((1, length), 10)
    if not hasattr(config, "vision_config"):
        return {"input_ids": ids}
    vision, grid = config.vision_config, torch.tensor(GRIDS)
    start = 5
    for patches in grid.prod(1).tolist():
        tokens = patches // vision.spatial_merge_size**2
        ids[0, start : start + tokens] = config.image_token_id
        start += tokens + 5  # text between the images
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(int(grid.prod(1).sum()), width)
    types = (ids == config.image_token_id).int()
    return {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": types}


@pytest.fixture(autouse=True)
def torchs_own_linear(monkeypatch):
    """Restore torch's `linear`: ZeRO-3 leaves DeepSpeed's in the process, which behaves differently under checkpointing."""
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_and_backward_are_what_torch_counts(family):
    model_class, config = FAMILIES[family]()
    model = model_class._from_config(config, attn_implementation="eager").train()
    length, head_tokens = 150, 60
    with FlopCounterMode(display=False) as forward:
        loss = model(**inputs(config, length), use_cache=False, logits_to_keep=head_tokens).logits.sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()

    grids = GRIDS if hasattr(config, "vision_config") else []
    found = forward_flops(config, [length], head_tokens, grids)
    uncausal = Flops(attention=found.attention)  # eager attention computes the other half too
    assert (found + uncausal).forward == pytest.approx(forward.get_total_flops(), rel=0.01)
    assert (found + uncausal).backward() == pytest.approx(backward.get_total_flops(), rel=0.01)


def test_frozen_vision_tower_has_no_backward_pass():
    model_class, config = qwen2_5_vl()
    model = model_class._from_config(config, attn_implementation="eager").train()
    model.model.visual.requires_grad_(False)
    loss = model(**inputs(config, 120), use_cache=False).logits.sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    found = forward_flops(config, [120], 120, GRIDS)
    expected = (found + Flops(attention=found.attention)).backward(train_vision=False)
    assert expected == pytest.approx(backward.get_total_flops(), rel=0.01)


def test_gradient_checkpointing_computes_the_layers_again():
    model_class, config = qwen2_5_vl()
    model = model_class._from_config(config, attn_implementation="eager").train()

    def counted() -> int:
        loss = model(**inputs(config, 120), use_cache=False).logits.sum()
        with FlopCounterMode(display=False) as backward:
            loss.backward()
        return backward.get_total_flops()

    without = counted()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = forward_flops(config, [120], 120, GRIDS)
    recomputed = (found + Flops(attention=found.attention)).recomputed()
    assert counted() - without == pytest.approx(recomputed, rel=0.01)


def test_packed_sequences_attend_to_themselves_alone():
    config = LlamaConfig(**TEXT)
    one, two = forward_flops(config, [100], 10), forward_flops(config, [50, 50], 10)
    assert two.attention == one.attention / 2
    assert (two.text, two.head) == (one.text, one.head)
    # 3 layers, 128 query channels, 100^2 / 2 pairs, scores and values, 2 operations each
    assert one.attention == 3 * 128 * 5000 * 2 * 2


def test_adapters_leave_out_the_weights_gradients():
    flops = forward_flops(LlamaConfig(**TEXT), [64], 16)
    assert flops.backward(lora=True) == flops.text + flops.head + 2 * flops.attention


def test_other_architectures_are_not_guessed():
    config = LlamaConfig(**TEXT)
    config.model_type = "mamba"
    assert not countable(config)
    with pytest.raises(ValueError, match="mamba"):
        forward_flops(config, [10], 1)
