"""One size and head of `bench.step`, in a process of its own: random weights and tokens, the trainer's own update.

python -m bench.step_case, with {"size": "tiny", "head": "mssr", ...} on standard input
"""

import json
import math
import statistics
import sys
from functools import partial
from typing import NamedTuple
from unittest.mock import patch

import mssr.environment  # noqa: F401  first, as in mssr.cli  # isort: skip
import torch
from torch import Tensor
from transformers import PretrainedConfig, Qwen2_5_VLConfig

from mssr.batch import Prompt, Sequences, UpdateBatch
from mssr.config.schema import LoraConfig, ModelConfig, OptimizerConfig, TrainConfig
from mssr.distributed import World, start_world
from mssr.observe.utilisation import peak_tflops, utilisation, work_of_step
from mssr.policy.architectures import model_config
from mssr.policy.attention import SDPA
from mssr.policy.engine import PolicyEngine
from mssr.policy.families import family_of
from mssr.policy.loading import apply_options
from mssr.policy.loss import PolicyGradient
from mssr.policy.model import Policy
from mssr.stopwatch import Stopwatch
from mssr_kernels import PolicyLossConfig

from . import models, roofs
from .child import say
from .memory import GIB, peak_bytes
from .step_heads import HEADS

SEQUENCES = 8  # of a micro-batch, their lengths as 1 : 2 : ... : 8
LEAST_TOKENS = 256
PHASES = ("forward_backward", "optimizer")
UNSHAPED = PolicyLossConfig(entropy_alpha=0.0)  # what Liger computes


class Size(NamedTuple):
    """A Qwen2.5-VL: a published one, perhaps with fewer layers, or a small one. tokens: of the micro-batch. lora: train
    only adapters."""

    path: str
    tokens: int
    lora: bool = False
    layers: int | None = None
    small: models.Size | None = None

    def config(self) -> PretrainedConfig:
        if self.small:
            return models.config(self.small)
        published = model_config(self.path).to_dict()
        if self.layers:
            published["text_config"] |= {"num_hidden_layers": self.layers, "layer_types": None}
        return Qwen2_5_VLConfig(**published)


QWEN_3B, QWEN_7B = (f"Qwen/Qwen2.5-VL-{size}-Instruct" for size in ("3B", "7B"))
SIZES = {
    "tiny": Size(QWEN_7B, 512, small=models.Size(128, 256, 2, 4, 1, 512)),
    # For a CPU: a vocabulary with which the head matters.
    "65k": Size(QWEN_7B, 2048, small=models.Size(512, 1408, 4, 8, 2, 65536)),
    "3b": Size(QWEN_3B, 16_384),
    # All weights of the 7B, with master weights and moments, take 133 GB: here 12 of its 28 layers, at full width.
    "7b": Size(QWEN_7B, 16_384, layers=12),
    "7b-lora": Size(QWEN_7B, 16_384, lora=True),
}


def main(case: dict):
    say(**measure(start_world(case["device"]), case))


def measure(world: World, case: dict) -> dict:
    """case: size, head, tokens, device, dtype, repeats, roof_tflops."""
    size = SIZES[case["size"]]
    config = size.config()
    options = model_options(size, case["dtype"])
    engine = make_engine(config, options, case, world)
    sequences = make_sequences(config, case["tokens"])
    noise = torch.randn(sequences.tokens.shape, generator=torch.Generator().manual_seed(1))
    old_logp = engine.score(sequences) + 0.05 * noise  # ratios near 1, as in training
    batch = UpdateBatch(
        sequences.prompts, sequences.tokens, sequences.mask, sequences.mask,
        logp=torch.zeros_like(old_logp), advantage=torch.linspace(-1.0, 1.5, SEQUENCES), old_logp=old_logp, ref_logp=None,
    )  # fmt: skip
    engine.policy.model.lm_head.__class__ = HEADS[case["head"]].kind
    checked = {}
    for name, loss_config in (("unshaped", UNSHAPED), ("shaped", PolicyLossConfig())):  # also the warm-up
        stats = engine.update(batch, PolicyGradient(loss_config))
        checked[name] = {"loss": stats.metrics["policy_loss"], "grad_norm": stats.grad_norm}
    steps = [timed_step(engine, batch, options, world, case["roof_tflops"]) for _ in range(case["repeats"])]
    held, peak = peak_bytes(lambda: engine.update(batch, PolicyGradient(PolicyLossConfig())), world.device.type)
    parameters = list(engine.policy.parameters())
    found = {name: [step[name] for step in steps] for name in steps[0]}
    return {
        "parameters": sum(parameter.numel() for parameter in parameters),
        "trained": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        "layers": config.get_text_config().num_hidden_layers,
        "vocabulary": config.get_text_config().vocab_size,
        "response_tokens": int(batch.lengths.sum()),
        "patches": sum(int(p.image_grid_thw.prod()) for p in batch.prompts if p.image_grid_thw is not None),
        "zero_stage": zero_stage(case["dtype"]),
        "checked": checked,
        "seconds_spread": [min(found["seconds"]), max(found["seconds"])],
        **{name: statistics.median(values) for name, values in found.items()},
        **{"held_gib": held / GIB, "peak_gib": peak / GIB, "extra_gib": (peak - held) / GIB},
    }


def model_options(size: Size, dtype: str) -> ModelConfig:
    lora = LoraConfig() if size.lora else None
    return ModelConfig(path=size.path, dtype=dtype, gradient_checkpointing=True, lora=lora)


def make_engine(config: PretrainedConfig, options: ModelConfig, case: dict, world: World) -> PolicyEngine:
    """Return the trainer's engine with random weights, without a file of them."""
    train = TrainConfig(micro_batch_tokens=case["tokens"], zero_stage=zero_stage(options.dtype))
    with patch("mssr.policy.engine.load_policy", partial(random_policy, config)):
        return PolicyEngine(options, OptimizerConfig(), train, world, temperature=1.0, total_updates=100)


def zero_stage(dtype: str) -> int:
    """Return the stage: on one rank they differ only in buffers; bfloat16 needs one for its float32 master weights."""
    return int(dtype == "bfloat16")


def random_policy(
    config: PretrainedConfig, path: str, dtype: torch.dtype, options: ModelConfig, device: torch.device
) -> Policy:
    """Replace `load_policy`; config replaces the one at the path."""
    torch.manual_seed(0)
    with device:
        policy = Policy(family_of(config).auto_class.from_config(config, dtype=dtype, attn_implementation=SDPA))
    apply_options(policy, options, device)
    return policy


# The batch.


def make_sequences(config: PretrainedConfig, tokens: int) -> Sequences:
    """Return `SEQUENCES` rows that fill one micro-batch: a third of each is prompt, half of every second prompt an image."""
    generator = torch.Generator().manual_seed(0)
    prompts, responses = [], []
    for row, length in enumerate(sequence_lengths(tokens)):
        prompt = max(4, length // 3)
        prompts.append(make_prompt(config, row, prompt, prompt // 2 if row % 2 else 0, generator))
        responses.append(random_tokens(config, length - prompt, generator))
    return Sequences.of(prompts, responses)


def sequence_lengths(tokens: int) -> list[int]:
    parts = SEQUENCES * (SEQUENCES + 1) // 2
    lengths = [tokens * part // parts for part in range(1, SEQUENCES + 1)]
    return [*lengths[:-1], lengths[-1] + tokens - sum(lengths)]


def make_prompt(
    config: PretrainedConfig, row: int, length: int, image_tokens: int, generator: torch.Generator
) -> Prompt:
    """image_tokens: about how many; 0 for text only."""
    grid = pixels = None
    image = torch.empty(0, dtype=torch.int64)
    if image_tokens:
        vision = config.vision_config
        side = vision.spatial_merge_size
        height = max(1, math.isqrt(image_tokens))
        width = image_tokens // height
        grid = torch.tensor([[1, height * side, width * side]])
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        pixels = torch.randn(int(grid.prod()), values, generator=generator)
        pads = [config.image_token_id] * (height * width)
        image = torch.tensor([config.vision_start_token_id, *pads, config.vision_end_token_id])
    ids = torch.cat([image, random_tokens(config, length - len(image), generator)])
    return Prompt(str(row), row, "", "", None, ids, pixels, grid, ())


def random_tokens(config: PretrainedConfig, count: int, generator: torch.Generator) -> Tensor:
    """Return [count] int64 text tokens; special tokens have larger ids."""
    return torch.randint(config.vision_start_token_id - 16, (count,), generator=generator)


# The measurement.


def timed_step(engine: PolicyEngine, batch: Sequences, options: ModelConfig, world: World, roof: float) -> dict:
    """Make one update; return seconds of it and its phases, and rates."""
    clock = Stopwatch(world.device)
    stats = engine.update(batch, PolicyGradient(PolicyLossConfig()), clock)
    seconds = sum(clock.seconds[phase] for phase in PHASES)
    rates = utilisation(work_of_step(engine.policy, batch, [stats]), clock, world, roof)
    return {
        "seconds": seconds,
        **{f"{phase}_seconds": clock.seconds[phase] for phase in PHASES},
        "tokens_per_second": tokens_of(batch) / seconds,
        "tflops": rates["perf/update_tflops"],
        "hardware_tflops": rates["perf/hardware_tflops"],
        "mfu": rates["perf/mfu"],
    }


def tokens_of(batch: Sequences) -> int:
    return sum(len(prompt.token_ids) for prompt in batch.prompts) + int(batch.lengths.sum())


def device_tflops(device: torch.device, dtype: str) -> tuple[float, str]:
    """Return what the device can do, and how that is known."""
    known = peak_tflops(device, None)
    if known:
        return known, "data sheet"
    return roofs.matmul_tflops(device.type, getattr(torch, dtype)), "a large product, measured beforehand"


if __name__ == "__main__":
    main(json.load(sys.stdin))
