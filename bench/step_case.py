"""One size and head of `bench.step`, in a process of its own: random weights and tokens, the update of the trainer.

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
from transformers import PretrainedConfig

from mssr.batch import Prompt, Sequences, UpdateBatch
from mssr.config.schema import LoraConfig, ModelConfig, OptimizerConfig, TrainConfig
from mssr.distributed import World, start_world
from mssr.observe.utilisation import utilisation, work_of_step
from mssr.policy.engine import PolicyEngine
from mssr.policy.loading import apply_options
from mssr.policy.loss import PolicyGradient
from mssr.policy.model import Policy
from mssr.stopwatch import Stopwatch
from mssr_kernels import PolicyLossConfig

from . import models
from .child import say
from .memory import GIB, peak_bytes
from .step_heads import HEADS

SEQUENCES = 8  # per micro-batch, with lengths 1 : 2 : ... : 8
PHASES = ("forward_backward", "optimizer")
UNSHAPED = PolicyLossConfig(entropy_alpha=0.0)  # what Liger computes


class Size(NamedTuple):
    """model: a name of `bench.models`. tokens: of the micro-batch. lora: train only adapters. text: keys of the text's
    config to change."""

    model: str
    tokens: int
    lora: bool = False
    text: dict | None = None


SIZES = {
    "tiny": Size("tiny", 512),
    "65k": Size("65k", 2048),
    "3b": Size("3b", 16_384),
    # All weights of the 7B, with master weights and moments, take 133 GB: here 12 of its 28 layers, at full width.
    "7b": Size("7b", 16_384, text={"num_hidden_layers": 12, "layer_types": None}),
    "7b-lora": Size("7b", 16_384, lora=True),
}


def main(case: dict):
    say(**measure(start_world(case["device"]), case))


def measure(world: World, case: dict) -> dict:
    """case: size, head, tokens, device, dtype, repeats."""
    size = SIZES[case["size"]]
    config, options = models.config(size.model, size.text), model_options(case)
    engine = make_engine(config, options, train_options(case), world)
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
    steps = [timed_step(engine, batch, options, world) for _ in range(case["repeats"])]
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
        "checked": checked,
        "seconds_spread": [min(found["seconds"]), max(found["seconds"])],
        **{name: statistics.median(values) for name, values in found.items()},
        **{"held_gib": held / GIB, "peak_gib": peak / GIB, "extra_gib": (peak - held) / GIB},
    }


def model_options(case: dict) -> ModelConfig:
    size = SIZES[case["size"]]
    lora = LoraConfig() if size.lora else None
    return ModelConfig(path=size.model, dtype=case["dtype"], gradient_checkpointing=True, lora=lora)


def train_options(case: dict) -> TrainConfig:
    # On one rank stages differ only in buffers, but float32 master weights of bfloat16 need one.
    return TrainConfig(micro_batch_tokens=case["tokens"], zero_stage=int(case["dtype"] == "bfloat16"))


def make_engine(config: PretrainedConfig, options: ModelConfig, train: TrainConfig, world: World) -> PolicyEngine:
    """Return the trainer's engine with random weights, which are never in a file."""
    with patch("mssr.policy.engine.load_policy", partial(random_policy, config)):
        return PolicyEngine(options, OptimizerConfig(), train, world, temperature=1.0, total_updates=100)


def random_policy(
    config: PretrainedConfig, path: str, dtype: torch.dtype, options: ModelConfig, device: torch.device
) -> Policy:
    """Stand in for `load_policy`; `path` is not read."""
    torch.manual_seed(0)
    policy = models.random_policy(config, dtype, device)
    apply_options(policy, options, device)
    return policy


# The batch.


def make_sequences(config: PretrainedConfig, tokens: int) -> Sequences:
    """Return SEQUENCES rows that fill one micro-batch: a third of each is prompt; half of every second prompt is an image."""
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


def timed_step(engine: PolicyEngine, batch: Sequences, options: ModelConfig, world: World) -> dict:
    """Make one update; return its seconds, and rates."""
    clock = Stopwatch(world.device)
    stats = engine.update(batch, PolicyGradient(PolicyLossConfig()), clock)
    seconds = sum(clock.seconds[phase] for phase in PHASES)
    work = work_of_step(engine.policy, batch, [stats])
    rates = utilisation(work, clock, world, peak=None)
    return {
        "seconds": seconds,
        "tokens_per_second": work.tokens / seconds,
        "tflops": rates["perf/update_tflops"],
    }


if __name__ == "__main__":
    main(json.load(sys.stdin))
