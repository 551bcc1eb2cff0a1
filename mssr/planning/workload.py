"""The lengths of prompts and responses that a plan assumes, and the micro-batches they make."""

import math
from dataclasses import dataclass

from transformers import PretrainedConfig

from mssr.config import Config
from mssr.config.resolve import pixel_limits
from mssr.data.processors import load_image_processor, own_pixel_limits
from mssr.errors import UserError
from mssr.planning.trace import MicroBatchShape
from mssr.policy.architectures import PUBLISHED_PIXELS, is_published


@dataclass(frozen=True)
class Workload:
    """Mean tokens of a prompt, of its response, and of the image in the prompt (0: no image)."""

    prompt: int
    response: int
    image: int

    @property
    def tokens(self) -> int:
        return self.prompt + self.response

    @classmethod
    def parse(cls, text: str, config: Config, model: PretrainedConfig) -> "Workload":
        """Read "prompt,response" or "prompt,response,image tokens".

        Raises:
            UserError: any other text.
        """
        try:
            numbers = [int(number) for number in text.split(",")]
            prompt, response, *image = numbers
        except ValueError:
            numbers, image = [], [0, 0]
        if len(image) > 1 or not numbers or min(prompt, response) < 1 or min(numbers) < 0 or sum(image) > prompt:
            raise UserError(
                f"--context {text}: expected mean lengths in tokens, PROMPT,RESPONSE or PROMPT,RESPONSE,IMAGE; "
                "the prompt includes the image: 600,1200,400"
            )
        if sum(image) and not hasattr(model, "vision_config"):
            raise UserError(
                f"--context {text}: {config.model.path} reads no images; leave out IMAGE: {prompt},{response}"
            )
        return cls(prompt, response, image[0] if image else _image_tokens(prompt, config, model))

    @classmethod
    def longest(cls, config: Config, model: PretrainedConfig) -> "Workload":
        """Prompts and responses at their limits, which the memory must be enough for."""
        prompt = config.data.max_prompt_tokens
        return cls(prompt, config.rollout.max_response_tokens, _image_tokens(prompt, config, model))

    def half(self) -> "Workload":
        return Workload(max(1, self.prompt // 2), max(1, self.response // 2), self.image // 2)

    def grids(self, model: PretrainedConfig) -> tuple[tuple[int, int, int], ...]:
        """(1, height, width) in patches of a nearly square image of about `image` tokens; () without image."""
        if not self.image:
            return ()
        side = model.vision_config.spatial_merge_size
        height = max(1, math.isqrt(self.image))
        return ((1, height * side, max(1, round(self.image / height)) * side),)

    def micro_batch(self, budget: int, model: PretrainedConfig) -> MicroBatchShape:
        """Return a micro-batch that fills the budget; a sequence longer than the budget is alone in it."""
        count = max(1, budget // self.tokens)
        lengths = [self.tokens] * count
        left = max(0, budget - count * self.tokens)  # a shorter sequence with the same share of response tokens
        responses = count * self.response + left * self.response // self.tokens
        return MicroBatchShape(tuple(lengths + [left] * (left > 0)), max(1, responses), self.grids(model) * count)


def with_own_pixel_limits(config: Config, model: PretrainedConfig) -> Config:
    """Fill in the model's own pixel limits; they stay null if it reads no images, or has no image processor."""
    if not hasattr(model, "vision_config"):
        return config
    if is_published(config.model.path):
        own = PUBLISHED_PIXELS
    elif processor := load_image_processor(config.model.path):
        own = own_pixel_limits(processor)
    else:
        return config
    low, high = pixel_limits(config.data, own)
    data = config.data.model_copy(update={"min_pixels": low, "max_pixels": high})
    return config.model_copy(update={"data": data})


def _image_tokens(prompt: int, config: Config, model: PretrainedConfig) -> int:
    """Tokens of the largest image, at most nine tenths of the prompt. data.max_pixels: null if no processor was found."""
    vision = getattr(model, "vision_config", None)
    if vision is None:
        return 0
    token_side, most = vision.patch_size * vision.spatial_merge_size, prompt * 9 // 10
    return most if config.data.max_pixels is None else min(config.data.max_pixels // token_side**2, most)
