"""Qwen2.5-VL configurations of any size, for `bench.step` and `bench.sync`; their weights are random."""

from typing import NamedTuple

from transformers import Qwen2_5_VLConfig


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


def config(size: Size, dtype: str = "float32", **more) -> Qwen2_5_VLConfig:
    """Return an untied model's config. more: token ids, of the text's config if named `text`.

    Special tokens not given are the last ones of the vocabulary.
    """
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
    return Qwen2_5_VLConfig(
        architectures=["Qwen2_5_VLForConditionalGeneration"], dtype=dtype, tie_word_embeddings=False,
        text_config=text | more.pop("text", {}), vision_config=vision, **special | more,
    )  # fmt: skip
