"""Qwen2.5-VL configurations for `bench.step` and `bench.sync`, by name; the weights are random."""

from typing import NamedTuple

import torch
from transformers import PretrainedConfig, Qwen2_5_VLConfig

from mssr.policy.architectures import model_config
from mssr.policy.attention import SDPA
from mssr.policy.families import family_of
from mssr.policy.model import Policy


class Size(NamedTuple):
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    vision_hidden: int = 128
    vision_intermediate: int = 256
    vision_layers: int = 2
    vision_heads: int = 4


# With the number of parameters.
SMALL = {
    "tiny": Size(128, 256, 2, 4, 1, 512),  # 1.2 M
    "20m": Size(384, 1024, 6, 6, 1, 8192, 256, 768, 4, 4),
    "65k": Size(512, 1408, 4, 8, 2, 65536),  # 79 M; a vocabulary with which the head matters on a CPU
    "100m": Size(768, 2304, 8, 12, 3, 16384, 512, 1408, 8, 8),
    "500m": Size(1280, 3840, 18, 20, 5, 32768, 768, 2304, 12, 12),
}
PUBLISHED = {size: f"Qwen/Qwen2.5-VL-{size.upper()}-Instruct" for size in ("3b", "7b")}


def config(name: str, text: dict | None = None, **more) -> Qwen2_5_VLConfig:
    """Return the config of a name of SMALL or PUBLISHED. text, more: keys of the text's and of the whole config to change."""
    values = small_config(SMALL[name]) if name in SMALL else model_config(PUBLISHED[name]).to_dict()
    values["text_config"] |= text or {}
    return Qwen2_5_VLConfig(**values | more)


def small_config(size: Size) -> dict:
    """Return the keys of an untied model's config. Special tokens are the last ones of the vocabulary."""
    half = size.hidden // size.heads // 2
    sections = [half // 4, half * 3 // 8, half * 3 // 8]
    text = dict(
        vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=size.intermediate,
        num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.kv_heads,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections},
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    vision = dict(
        depth=size.vision_layers, hidden_size=size.vision_hidden, intermediate_size=size.vision_intermediate,
        num_heads=size.vision_heads, out_hidden_size=size.hidden,
        fullatt_block_indexes=list(range(size.vision_layers))[3::4] or [size.vision_layers - 1],
    )  # fmt: skip
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    special = {name: size.vocabulary - len(names) + place for place, name in enumerate(names)}
    return dict(tie_word_embeddings=False, text_config=text, vision_config=vision) | special


def random_policy(config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> Policy:
    with device:
        return Policy(family_of(config).auto_class.from_config(config, dtype=dtype, attn_implementation=SDPA))
