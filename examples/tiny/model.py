"""Writes a tiny model of a real architecture with a tokenizer trained on the task's text, for the demo and tests."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
)

from mssr.errors import UserError
from mssr.policy.families import FAMILIES, Family

TEXT_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SPECIAL_TOKENS = [*TEXT_TOKENS, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
HEAD_DIM = 32  # the smallest that vLLM's CPU attention supports

INITIALIZER_RANGE = 0.06  # about 1 / sqrt(width); with the family's 0.02 the warm start takes twice as long

# Qwen's chat format; an image is <|vision_start|><|image_pad|><|vision_end|>.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ item['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tiny_model(
    out: Path,
    corpus: Iterable[str],
    *,
    family: str = "qwen2_5_vl",
    seed: int = 0,
    hidden: int = 128,
    layers: int = 2,
    vision_layers: int = 2,
    vocabulary: int = 512,
    tied: bool = False,
) -> Path:
    """Write a randomly initialised model, its tokenizer and image processor (if any) as a Hugging Face directory.

    corpus: texts for training the tokenizer (byte-level BPE, so any text can be encoded).
    family: a `model_type` of `families.FAMILIES`.
    hidden: width; a multiple of 64 (heads of 32).
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: already there; name another folder")
    kind = FAMILIES[family]
    tokenizer = train_tokenizer(corpus, vocabulary, SPECIAL_TOKENS if kind.has_vision else TEXT_TOKENS)
    config = _tiny_config(family, kind, tokenizer, hidden=hidden, layers=layers, vision_layers=vision_layers, tied=tied)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind.auto_class.from_config(config)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    if kind.has_vision:
        Qwen2VLImageProcessorPil(**_IMAGES.get(family, {})).save_pretrained(out)
    return out


def train_tokenizer(
    corpus: Iterable[str], vocabulary: int, special_tokens: list[str] = SPECIAL_TOKENS
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with Qwen's special tokens and chat format.

    Merges may cross words, so that a fixed phrase becomes one token and sequences stay short; digits are never merged.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special_tokens,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )


# Settings of the image processor that differ from Qwen2-VL's.
_IMAGES: dict[str, dict[str, Any]] = {
    "qwen3_vl": {
        "patch_size": 16,
        "size": {"shortest_edge": 65_536, "longest_edge": 16_777_216},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
}


def _tiny_config(
    family: str, kind: Family, tokenizer, *, hidden: int, layers: int, vision_layers: int, tied: bool
) -> PretrainedConfig:
    token = tokenizer.convert_tokens_to_ids
    text = _text_config(family, kind, tokenizer, hidden=hidden, layers=layers)
    if not kind.has_vision:
        return AutoConfig.for_model(family, **text, tie_word_embeddings=tied)
    return AutoConfig.for_model(
        family,
        text_config=text,
        vision_config=_vision_config(family, hidden=hidden, layers=vision_layers),
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=tied,
    )


def _text_config(family: str, kind: Family, tokenizer, *, hidden: int, layers: int) -> dict[str, Any]:
    token = tokenizer.convert_tokens_to_ids
    heads = hidden // HEAD_DIM
    # Sequences are short and images small: rotary frequencies must be high enough, with enough of them for columns, to
    # distinguish the left half of an image from the right.
    rotary = {"rope_type": "default", "rope_theta": 100.0}
    if family == "qwen3_vl":
        rotary |= {"mrope_section": [6, 5, 5], "mrope_interleaved": True}
    elif kind.has_vision:
        rotary["mrope_section"] = [2, 2, 12]
    return dict(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        max_position_embeddings=4096,
        initializer_range=INITIALIZER_RANGE,
        rope_parameters=rotary,
        bos_token_id=None,
        eos_token_id=token("<|im_end|>"),
        pad_token_id=token("<|endoftext|>"),
        **({"head_dim": HEAD_DIM} if family.startswith("qwen3") else {}),
    )


def _vision_config(family: str, *, hidden: int, layers: int) -> dict[str, Any]:
    sizes = {"depth": layers, "num_heads": hidden // HEAD_DIM, "initializer_range": INITIALIZER_RANGE}
    if family == "qwen2_vl":
        return sizes | {"embed_dim": hidden, "mlp_ratio": 2, "hidden_size": hidden}
    sizes |= {"hidden_size": hidden, "intermediate_size": 2 * hidden, "out_hidden_size": hidden}
    if family == "qwen3_vl":  # features of the first block go into the language model's first layer
        return sizes | {"deepstack_visual_indexes": [0], "num_position_embeddings": 64}
    return sizes | {"fullatt_block_indexes": list(range(layers))}
