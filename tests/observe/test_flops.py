"""FLOPs from weights and inputs, compared with torch's count while real models run."""

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

from mssr.config.schema import LoraConfig
from mssr.observe.flops import Flops, policy_flops
from mssr.policy.lora import add_adapters
from mssr.policy.model import Policy

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


def built(make) -> Policy:
    model_class, config = make()
    return Policy(model_class._from_config(config, attn_implementation="eager").train())


def loss_of(policy: Policy, length: int, head_tokens: int) -> torch.Tensor:
    """The sum of the logits; the image pads' are -inf."""
    given = inputs(policy.model.config, length)
    return policy.model(**given, use_cache=False, logits_to_keep=head_tokens).logits[..., 10:].sum()


def found(policy: Policy, length: int, head_tokens: int) -> Flops:
    """What is counted, and the half of the attention that only eager attention computes."""
    text = policy.model.config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    unused = 2 * text.num_hidden_layers * text.num_attention_heads * head_dim * length**2
    grids = GRIDS if policy.family.has_vision else []
    return policy_flops(policy, [length], head_tokens, grids) + Flops(unused, 2 * unused, unused)


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_and_backward_are_what_torch_counts(family):
    policy = built(FAMILIES[family])
    with FlopCounterMode(display=False) as forward:
        loss = loss_of(policy, 150, 60)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    flops = found(policy, 150, 60)
    assert flops.forward == pytest.approx(forward.get_total_flops(), rel=0.01)
    assert flops.backward == pytest.approx(backward.get_total_flops(), rel=0.01)


def backward_flops(policy: Policy) -> int:
    loss = loss_of(policy, 120, 120)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return backward.get_total_flops()


def test_frozen_vision_tower_has_no_backward_pass():
    policy = built(qwen2_5_vl)
    policy.vision_tower.requires_grad_(False)
    assert found(policy, 120, 120).backward == pytest.approx(backward_flops(policy), rel=0.01)


def test_with_adapters_only_their_weights_have_gradients():
    policy = built(qwen2_5_vl)
    add_adapters(policy, LoraConfig(rank=8))
    # The first layer's input has a gradient too, as all others have.
    policy.model.get_input_embeddings().register_forward_hook(lambda *call: call[-1].requires_grad_())
    assert found(policy, 120, 120).backward == pytest.approx(backward_flops(policy), rel=0.01)


@pytest.mark.parametrize("rank", [None, 8], ids=["whole", "adapters"])
def test_gradient_checkpointing_computes_the_layers_again(rank):
    policy = built(qwen2_5_vl)
    policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    if rank:
        add_adapters(policy, LoraConfig(rank=rank))
    twice = backward_flops(policy)
    policy.model.gradient_checkpointing_disable()
    assert twice - backward_flops(policy) == pytest.approx(found(policy, 120, 120).recomputed, rel=0.01)


def test_packed_sequences_attend_to_themselves_alone():
    policy = built(FAMILIES["llama"])
    one, two = policy_flops(policy, [100], 10), policy_flops(policy, [50, 50], 10)
    # 3 layers, 128 query channels, 100^2 / 2 pairs or half as many, scores and values, 2 operations each
    pairs = 3 * 128 * 2 * 2 * 2500
    assert (one.forward - two.forward, one.backward - two.backward) == (pairs, 2 * pairs)
