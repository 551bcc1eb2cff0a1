"""A real tokenizer and image processor of the Qwen2.5-VL kind, built here: no download."""

import io

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mssr.config import DataConfig
from mssr.data.dataset import ProblemDataset
from mssr.data.prompts import PromptEncoder

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]

VISION_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for item in message.content %}{% if item.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ item.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE: 256 bytes and the special tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        vocab_size=256 + len(SPECIAL_TOKENS),
    )
    bpe.train_from_iterator([""], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL_TOKENS,
        chat_template=template,
    )


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer(VISION_TEMPLATE)


@pytest.fixture(scope="session")
def text_tokenizer():
    return build_tokenizer(TEXT_TEMPLATE)


@pytest.fixture(scope="session")
def image_processor():
    return Qwen2VLImageProcessorPil()


@pytest.fixture
def make_encoder(tokenizer, image_processor):
    """An encoder of the vision tokenizer with changed `data.*` keys."""

    def make(**keys):
        small = {"train": "unused", "min_pixels": 784, "max_pixels": 100_352, "instruction": "Box it."}
        config = DataConfig(**small | keys)
        return PromptEncoder(tokenizer, image_processor, config)

    return make


@pytest.fixture
def make_dataset(make_encoder):
    def make(path, source_name=None, **keys):
        encoder = make_encoder(**keys)
        return ProblemDataset(str(path), encoder, encoder.config, source_name)

    return make


@pytest.fixture(scope="session")
def png():
    """PNG bytes of a picture of noise: `png(width, height, seed)`."""

    def make(width=56, height=56, seed=0):
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="PNG")
        return buffer.getvalue()

    return make
