"""The model's image processor with the run's pixel limits, and what is saved with a trained model so that others see
the same pixels."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, BaseImageProcessor, PreTrainedTokenizerBase
from transformers.utils import cached_file

from mssr.config.data_keys import DataConfig
from mssr.config.resolve import pixel_limits
from mssr.errors import UserError, shortened

IMAGES, VIDEOS, BOTH = "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"


def load_image_processor(path: str | Path) -> BaseImageProcessor | None:
    """Return the image processor of a model directory or hub name; None for a text-only model.

    It is the PIL one, which needs no torchvision and gives the same pixels on every machine.

    Raises:
        UserError: its file cannot be read.
    """
    if not any(_file(path, name) for name in (IMAGES, BOTH)):
        return None
    try:
        return AutoImageProcessor.from_pretrained(path, backend="pil")
    except Exception as error:  # a damaged file, or a class that transformers does not have
        reason = shortened(error, 300)
        raise UserError(f"model.path {path}: no image processor can be loaded from it: {reason}") from None


def own_pixel_limits(processor: BaseImageProcessor) -> tuple[int, int]:
    """Return the fewest and the most pixels that a Qwen image processor scales to.

    Raises:
        UserError: it has no such limits.
    """
    size = dict(processor.size)  # files written by some versions have min_pixels and max_pixels in it
    low = size.get("shortest_edge") or size.get("min_pixels")
    high = size.get("longest_edge") or size.get("max_pixels")
    if not low or not high:
        raise UserError(
            f"model.path: its image processor, {type(processor).__name__}, has no pixel limits as Qwen's has"
        )
    return low, high


def with_pixel_limits(processor: BaseImageProcessor, data: DataConfig) -> BaseImageProcessor:
    """Return a copy of a Qwen image processor whose own limits are the run's.

    Raises:
        UserError: data.min_pixels or data.max_pixels contradicts the processor's own other limit.
    """
    low, high = pixel_limits(data, own_pixel_limits(processor))
    limited = copy.deepcopy(processor)
    limited.size = {"shortest_edge": low, "longest_edge": high}
    return limited


@dataclass(frozen=True)
class VisionSettings:
    """What is saved of a model's processors for images and videos.

    images: saved with its limits by every name: transformers and vLLM read `size`; Qwen's own files and older versions have
        min_pixels and max_pixels, which win where they are there.
    videos: the settings as they came; without a file of their own, videos would be read with the images' limits.
    """

    images: BaseImageProcessor
    videos: dict[str, Any]

    def save_pretrained(self, folder: Path) -> None:
        self.images.save_pretrained(folder)
        low, high = own_pixel_limits(self.images)
        images = json.loads((Path(folder) / IMAGES).read_text()) | {"min_pixels": low, "max_pixels": high}
        for name, values in ((IMAGES, images), (VIDEOS, self.videos)):
            (Path(folder) / name).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def processors_to_save(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, image_processor: BaseImageProcessor | None
) -> tuple:
    """Return what belongs in the folder of a model trained from `path`, each with `save_pretrained`.

    image_processor: with the run's pixel limits.
    """
    if image_processor is None:
        return (tokenizer,)
    return tokenizer, VisionSettings(image_processor, _video_settings(path))


def _video_settings(path: str | Path) -> dict[str, Any]:
    """Return what transformers would read for the video processor of `path`; without a file of its own, the images'."""
    both = _file(path, BOTH)
    nested = json.loads(Path(both).read_text()) if both else {}
    if "video_processor" in nested:
        return nested["video_processor"]
    found = _file(path, VIDEOS) or _file(path, IMAGES)
    return json.loads(Path(found).read_text()) if found else nested.get("image_processor", {})


def _file(path: str | Path, name: str) -> str | None:
    return cached_file(path, name, _raise_exceptions_for_missing_entries=False)
