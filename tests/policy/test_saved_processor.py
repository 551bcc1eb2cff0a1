"""A saved model's own processor, in plain transformers, makes the tokens and pixels that the run trained on."""

import pytest
import torch
from family_helpers import VISION
from saved_model import CHAT, SIZES, picture, prompt_of, saved_model
from transformers import AutoImageProcessor, AutoProcessor

TOKENS = {14: [45, 30, 35], 16: [32, 24, 30]}  # by patch size: of an image of 20,000 to 40,000 pixels


@pytest.mark.parametrize("family", VISION)
def test_plain_transformers_reads_images_as_the_run_did(family, tmp_path):
    encoder, folder = saved_model(family, tmp_path)
    plain = AutoProcessor.from_pretrained(folder)
    exact = AutoImageProcessor.from_pretrained(folder, backend="pil")
    text = plain.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    counts = []
    for size in SIZES:
        image = picture(size)
        prompt = prompt_of(encoder, image)
        own = plain(text=[text], images=[image], return_tensors="pt")
        assert torch.equal(own["input_ids"][0], prompt.token_ids)
        assert torch.equal(own["image_grid_thw"], prompt.image_grid_thw)
        # By default transformers resizes with torchvision, which rounds some values differently; PIL's are the run's.
        torch.testing.assert_close(own["pixel_values"], prompt.pixel_values, atol=2.01 / 255 / 0.26, rtol=0)
        assert torch.equal(exact([image], return_tensors="pt")["pixel_values"], prompt.pixel_values)
        counts.append(int((prompt.token_ids == encoder.image_token_id).sum()))
    assert counts == TOKENS[encoder.image_processor.patch_size]
