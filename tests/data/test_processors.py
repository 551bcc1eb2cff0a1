"""Pixel limits: those of the run, else the model's own; a saved folder carries them for transformers."""

import json

import pytest
from transformers import AutoImageProcessor, AutoVideoProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mssr.config.data_keys import DataConfig
from mssr.data.processors import load_image_processor, own_pixel_limits, processors_to_save, with_pixel_limits
from mssr.errors import UserError

OWN = {"min_pixels": 3136, "max_pixels": 100_352}


def limits(**keys) -> tuple[int, int]:
    return own_pixel_limits(with_pixel_limits(Qwen2VLImageProcessorPil(**OWN), DataConfig(train="unused", **keys)))


def test_limits_that_are_not_set_are_the_models_own():
    assert limits() == (3136, 100_352)
    assert limits(min_pixels=784) == (784, 100_352)
    assert limits(max_pixels=50_176) == (3136, 50_176)
    assert limits(min_pixels=784, max_pixels=1568) == (784, 1568)


def test_a_limit_that_contradicts_the_models_own_other_one_is_refused():
    with pytest.raises(UserError, match="data.min_pixels 200000 is larger than the model's own max_pixels 100352"):
        limits(min_pixels=200_000)
    with pytest.raises(UserError, match="the model's own min_pixels 3136 is larger than data.max_pixels 784; set"):
        limits(max_pixels=784)


def test_a_small_image_stays_small_where_nothing_is_set(make_encoder, png):
    row = {"images": [png(112, 112)], "problem": "How many?", "answer": "3"}
    prompt = make_encoder(min_pixels=None, max_pixels=None).encode(row, 0, "s")
    assert prompt.image_grid_thw.tolist() == [[1, 8, 8]]  # 16 tokens


def test_the_processor_that_was_given_is_left_as_it_was():
    given = Qwen2VLImageProcessorPil(**OWN)
    with_pixel_limits(given, DataConfig(train="unused", min_pixels=784, max_pixels=1568))
    assert own_pixel_limits(given) == (3136, 100_352)


# The forms in which Qwen's processors are published or were saved by some version of transformers.
FORMS = {
    "published": {"preprocessor_config.json": {**OWN, "image_processor_type": "Qwen2VLImageProcessor"}},
    "limits in size": {"preprocessor_config.json": {"size": OWN, "image_processor_type": "Qwen2VLImageProcessor"}},
    "both": {
        "preprocessor_config.json": {
            **OWN, "size": {"shortest_edge": 3136, "longest_edge": 100_352},
            "image_processor_type": "Qwen2VLImageProcessor",
        }
    },
    "one file for all": {
        "processor_config.json": {
            "image_processor": {
                "size": {"shortest_edge": 3136, "longest_edge": 100_352}, "image_processor_type": "Qwen2VLImageProcessor",
            },
            "video_processor": {
                "size": {"shortest_edge": 4096, "longest_edge": 200_704}, "video_processor_type": "Qwen2VLVideoProcessor",
            },
        }
    },
    "a file for videos": {
        "preprocessor_config.json": {**OWN, "image_processor_type": "Qwen2VLImageProcessor"},
        "video_preprocessor_config.json": {
            "size": {"shortest_edge": 4096, "longest_edge": 200_704}, "video_processor_type": "Qwen2VLVideoProcessor",
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_what_is_saved_has_the_runs_limits_for_images_and_the_models_own_for_videos(form, tmp_path, tokenizer):
    start, saved = tmp_path / "start", tmp_path / "saved"
    start.mkdir()
    for name, values in FORMS[form].items():
        (start / name).write_text(json.dumps(values))
    (start / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}))
    processor = load_image_processor(start)
    assert own_pixel_limits(processor) == (3136, 100_352)
    limited = with_pixel_limits(processor, DataConfig(train="unused", min_pixels=784, max_pixels=1568))
    for part in processors_to_save(start, tokenizer, limited):
        part.save_pretrained(saved)
    written = json.loads((saved / "preprocessor_config.json").read_text())
    assert (written["min_pixels"], written["max_pixels"]) == (784, 1568)
    for own in (AutoImageProcessor.from_pretrained(saved), AutoImageProcessor.from_pretrained(saved, backend="pil")):
        assert (own.size["shortest_edge"], own.size["longest_edge"]) == (784, 1568)
    (saved / "config.json").write_text((start / "config.json").read_text())
    before, after = (AutoVideoProcessor.from_pretrained(folder) for folder in (start, saved))
    assert after.size == before.size
    assert after.size["longest_edge"] != 1568


def test_a_processor_without_limits_is_named():
    processor = Qwen2VLImageProcessorPil()
    processor.size = {"height": 224, "width": 224}
    with pytest.raises(UserError, match="Qwen2VLImageProcessorPil, has no pixel limits"):
        own_pixel_limits(processor)
