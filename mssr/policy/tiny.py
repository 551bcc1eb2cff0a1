"""A tiny Qwen2.5-VL of the real architecture, with a tokenizer trained on the task's own text: for the demo and tests."""

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip

INITIALIZER_RANGE = 0.06  # about 1 / sqrt(width) of so narrow a model; the family's 0.02 doubles the warm start

# Qwen's format: one turn each, an image as <|vision_start|><|image_pad|><|vision_end|>.
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
    seed: int = 0,
    hidden: int = 128,
    layers: int = 2,
    vision_layers: int = 2,
    vocabulary: int = 512,
    tied: bool = False,
) -> Path:
    """Writes a randomly initialised model, its tokenizer and image processor as a Hugging Face directory.

    corpus: texts the tokenizer's merges are learned from (byte-level BPE: any text can be encoded).
    hidden: width; a multiple of 64 (heads of 32).
    """
    tokenizer = train_tokenizer(corpus, vocabulary)
    config = _tiny_config(tokenizer, hidden=hidden, layers=layers, vision_layers=vision_layers, tied=tied)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    Qwen2VLImageProcessorPil().save_pretrained(out)
    return out


def train_tokenizer(corpus: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with Qwen's special tokens and chat format.

    Merges may cross words, so a fixed phrase becomes one token and sequences stay short; digits are never merged.
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
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )


def _tiny_config(tokenizer, *, hidden: int, layers: int, vision_layers: int, tied: bool) -> Qwen2_5_VLConfig:
    token = tokenizer.convert_tokens_to_ids
    heads = hidden // 32
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        max_position_embeddings=4096,
        initializer_range=INITIALIZER_RANGE,
        # Short sequences, small images: frequencies high enough, and enough of them for the image's columns, that the
        # left half of a picture can be told from the right.
        rope_parameters={"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 2, 12]},
        bos_token_id=None,
        eos_token_id=token("<|im_end|>"),
        pad_token_id=token("<|endoftext|>"),
    )
    vision = dict(
        depth=vision_layers,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_heads=heads,
        out_hidden_size=hidden,
        fullatt_block_indexes=list(range(vision_layers)),
        initializer_range=INITIALIZER_RANGE,
    )
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=tied,
    )
