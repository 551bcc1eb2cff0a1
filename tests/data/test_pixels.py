"""Packed pixels are restored bit for bit, or are not packed."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mssr.data.pixels import pixel_table


def picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "patch_size": 16},  # Qwen3-VL
        {"do_normalize": False},
        {"do_rescale": False},
        {"image_mean": [10.0, 0.1, -3.0], "image_std": [7.0, 0.01, 1.0]},
        {"temporal_patch_size": 1},
    ],
)
def test_every_bit_comes_back_from_an_eighth(keys):
    processor = Qwen2VLImageProcessorPil(**keys)
    table = pixel_table(processor)
    pixels = processor([picture(300, 200), picture(60, 500, seed=1)], return_tensors="pt")["pixel_values"]
    packed = table.pack(pixels)
    assert packed.dtype == torch.uint8
    assert packed.nbytes * 4 * processor.temporal_patch_size == pixels.nbytes
    back = table.unpack(packed)
    assert back.dtype == torch.float32 and back.is_contiguous()
    assert torch.equal(back.view(torch.int32), pixels.view(torch.int32))


def test_what_would_not_come_back_is_not_packed(image_processor):
    table = pixel_table(image_processor)
    pixels = image_processor([picture(56, 56)], return_tensors="pt")["pixel_values"]
    assert table.pack(pixels) is not None
    for place in (0, 200, 1175):  # first frame, second frame, last channel
        other = pixels.clone()
        other[3, place] = torch.nextafter(other[3, place], torch.tensor(9.0))
        assert table.pack(other) is None
    for value in (float("nan"), float("inf"), 1e30):
        assert table.pack(torch.full_like(pixels, value)) is None
    assert table.pack(pixels.double()) is None
    assert table.pack(pixels[:, :-1]) is None
    assert table.pack(pixels.view(4, 4, -1)) is None


def test_other_processors_have_no_table():
    assert pixel_table(None) is None
    assert pixel_table(object()) is None
