"""Fixtures of the data tests: encoders, datasets and images."""

import io

import numpy as np
import pytest
from data_encoders import SMALL, TEXT_TEMPLATE, VISION_TEMPLATE, build_tokenizer
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mssr.config.data_keys import DataConfig
from mssr.data.dataset import ProblemDataset
from mssr.data.prompts import PromptEncoder


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
    """Return an encoder with the vision tokenizer and changed `data.*` keys: `make_encoder(**keys)`."""
    return lambda **keys: PromptEncoder(tokenizer, image_processor, DataConfig(**SMALL | keys))


@pytest.fixture
def make_dataset(make_encoder):
    def make(path, **keys):
        encoder = make_encoder(**keys)
        return ProblemDataset(str(path), encoder, encoder.config)

    return make


@pytest.fixture(scope="session")
def png():
    """Return the PNG bytes of a noise image: `png(width, height, seed)`."""

    def make(width=56, height=56, seed=0):
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="PNG")
        return buffer.getvalue()

    return make
