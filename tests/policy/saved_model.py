"""A tiny model saved as a run saves it, and the images that it is asked about."""

import io

import numpy as np
import torch
from family_helpers import family_dir
from PIL import Image
from policy_helpers import ALONE

from mssr.config.data_keys import DataConfig
from mssr.data.processors import processors_to_save
from mssr.data.prompts import PromptEncoder, load_processors
from mssr.policy.export import save_model
from mssr.policy.loading import load_policy

CHAT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?\nBox it."}]}]
DATA = DataConfig(train="unused", min_pixels=20_000, max_pixels=40_000, instruction="Box it.")
SIZES = [(500, 300), (40, 30), (200, 150)]  # scaled down, scaled up, kept


def saved_model(family, folder):
    """Return the run's encoder and the folder."""
    encoder = PromptEncoder(*load_processors(family_dir(family)), DATA)
    policy = load_policy(family_dir(family), torch.float32)
    processors = processors_to_save(family_dir(family), encoder.tokenizer, encoder.image_processor)
    return encoder, save_model(policy, processors, folder / "model", ALONE)


def picture(size) -> Image.Image:
    """Return a smooth picture, on which resizing by PIL and by torchvision agree but for rounding."""
    x, y = (np.linspace(0, 6, side) for side in size)
    waves = [np.sin(x[None] * rate + y[:, None]) for rate in (1, 2, 3)]
    return Image.fromarray((127 + 120 * np.stack(waves, axis=2)).astype(np.uint8))


def prompt_of(encoder, image):
    file = io.BytesIO()
    image.save(file, format="PNG")
    return encoder.encode({"problem": "How many?", "answer": "3", "images": [file.getvalue()]}, 0, "s")
