"""One size and head of `bench.step`, in a process of its own: random weights, random tokens, the trainer's own update.

python -m bench.step_case '{"size": "tiny", "head": "mssr", ...}'
"""

import gc
import json
import math
import resource
import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import mssr.environment  # noqa: F401  first, as in mssr.cli  # isort: skip
import torch
from torch import Tensor
from transformers import PretrainedConfig, Qwen2_5_VLConfig

from mssr.batch import Prompt, RolloutBatch, pad_rows
from mssr.config import LoraConfig, ModelConfig, OptimizerConfig, TrainConfig
from mssr.distributed import World, start_world
from mssr.observe.utilisation import peak_tflops, utilisation, work_of_step
from mssr.policy.architectures import model_config
from mssr.policy.attention import SDPA
from mssr.policy.engine import PolicyEngine
from mssr.policy.families import family_of
from mssr.policy.loading import apply_options
from mssr.policy.model import Policy
from mssr.stopwatch import Stopwatch
from mssr_kernels import PolicyLossConfig

from . import heap
from .memory import resident_bytes
from .step_heads import HEADS
from .sync_case import GIB

SEQUENCES = 8  # of a micro-batch, their lengths as 1 : 2 : ... : 8
LEAST_TOKENS = 256
PHASES = ("forward_backward", "optimizer")
UNSHAPED = PolicyLossConfig(entropy_alpha=0.0)  # what Liger computes


class Size(NamedTuple):
    """A published Qwen2.5-VL. tokens: of the micro-batch. lora: only adapters are trained.

    text, vision, top: keys of its config, of the two parts and outside of them, that are changed.
    """

    path: str
    tokens: int
    lora: bool = False
    text: dict | None = None
    vision: dict | None = None
    top: dict | None = None

    def config(self) -> PretrainedConfig:
        published = model_config(self.path).to_dict()
        parts = {"text_config": self.text, "vision_config": self.vision}
        changed = {name: published[name] | (part or {}) for name, part in parts.items()}
        return Qwen2_5_VLConfig(**published | changed | (self.top or {}))


def small(tokens: int, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> Size:
    """An untied model with a tower of two blocks."""
    half = hidden // heads // 2
    sections = [half // 4, half * 3 // 8, half * 3 // 8]
    text = dict(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, bos_token_id=None, eos_token_id=None, layer_types=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections},
    )  # fmt: skip
    vision = dict(
        depth=2, hidden_size=128, num_heads=4, intermediate_size=256, out_hidden_size=hidden, fullatt_block_indexes=[1]
    )
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    special = {name: vocabulary - 4 + place for place, name in enumerate(names)}
    return Size(QWEN_7B, tokens, text=text, vision=vision, top=special)


QWEN_3B, QWEN_7B = (f"Qwen/Qwen2.5-VL-{size}-Instruct" for size in ("3B", "7B"))
SIZES = {
    "tiny": small(512, 128, 256, 2, 4, 1, 512),
    "65k": small(2048, 512, 1408, 4, 8, 2, 65536),  # for a CPU: a vocabulary where the head matters
    "3b": Size(QWEN_3B, 16_384),
    # All weights of the 7B, their masters and moments take 133 GB: here 12 of its 28 layers, of their own width.
    "7b": Size(QWEN_7B, 16_384, text={"num_hidden_layers": 12, "layer_types": None}),
    "7b-lora": Size(QWEN_7B, 16_384, lora=True),
}


def main(case: dict):
    if case["limit_gib"] and case["device"] == "cpu":
        resource.setrlimit(resource.RLIMIT_DATA, (int(case["limit_gib"] * GIB),) * 2)
    result = measure(start_world(case["device"]), case)
    print(json.dumps(result), flush=True)


def measure(world: World, case: dict) -> dict:
    """case: size, head, tokens, device, dtype, repeats, roof_tflops, limit_gib."""
    size = SIZES[case["size"]]
    config = size.config()
    options = model_options(size, case["dtype"])
    engine = make_engine(config, options, case, world)
    batch = make_batch(config, case["tokens"])
    noise = torch.randn(batch.logp.shape, generator=torch.Generator().manual_seed(1))
    batch = replace(batch, old_logp=engine.score(batch) + 0.05 * noise)  # ratios near 1, as in training
    engine.policy.model.lm_head.__class__ = HEADS[case["head"]].kind
    checked = {}
    for name, loss_config in (("unshaped", UNSHAPED), ("shaped", PolicyLossConfig())):  # also the warm-up
        stats = engine.update(batch, loss_config)
        checked[name] = {"loss": stats.metrics["policy_loss"], "grad_norm": stats.grad_norm}
    steps = [timed_step(engine, batch, options, world, case["roof_tflops"]) for _ in range(case["repeats"])]
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
        **{name: statistics.median(values) for name, values in found.items() if not name.endswith("_gib")},
        **{name: max(values) for name, values in found.items() if name.endswith("_gib")},
    }


def model_options(size: Size, dtype: str) -> ModelConfig:
    lora = LoraConfig() if size.lora else None
    return ModelConfig(path=size.path, dtype=dtype, gradient_checkpointing=True, lora=lora)


def make_engine(config: PretrainedConfig, options: ModelConfig, case: dict, world: World) -> PolicyEngine:
    """The trainer's engine around random weights, which no file has to hold."""
    train = TrainConfig(micro_batch_tokens=case["tokens"], zero_stage=zero_stage(options.dtype))
    with patch("mssr.policy.engine.load_policy", partial(random_policy, config)):
        return PolicyEngine(options, OptimizerConfig(), train, world, temperature=1.0, total_updates=100)


def zero_stage(dtype: str) -> int:
    """On one rank the stages differ in buffers alone; bfloat16 needs one for its float32 masters."""
    return int(dtype == "bfloat16")


def random_policy(
    config: PretrainedConfig, path: str, dtype: torch.dtype, options: ModelConfig, device: torch.device
) -> Policy:
    """In the place of `load_policy`. config: in the place of the one at the path."""
    torch.manual_seed(0)
    with device:
        policy = Policy(family_of(config).auto_class.from_config(config, dtype=dtype, attn_implementation=SDPA))
    apply_options(policy, options, device)
    return policy


# The batch.


def make_batch(config: PretrainedConfig, tokens: int) -> RolloutBatch:
    """`SEQUENCES` rows that fill one micro-batch: a third of each is its prompt, half of every other prompt an image."""
    generator = torch.Generator().manual_seed(0)
    prompts, responses = [], []
    for row, length in enumerate(sequence_lengths(tokens)):
        prompt = max(4, length // 3)
        prompts.append(make_prompt(config, row, prompt, prompt // 2 if row % 2 else 0, generator))
        responses.append(random_tokens(config, length - prompt, generator))
    longest = max(map(len, responses))
    mask = pad_rows([torch.ones_like(response) for response in responses], longest).bool()
    return RolloutBatch(
        prompts=tuple(prompts),
        tokens=pad_rows(responses, longest),
        mask=mask,
        logp=torch.zeros(mask.shape),
        truncated=torch.zeros(SEQUENCES, dtype=torch.bool),
        advantage=torch.linspace(-1.0, 1.5, SEQUENCES),
    )


def sequence_lengths(tokens: int) -> list[int]:
    parts = SEQUENCES * (SEQUENCES + 1) // 2
    lengths = [tokens * part // parts for part in range(1, SEQUENCES + 1)]
    return [*lengths[:-1], lengths[-1] + tokens - sum(lengths)]


def make_prompt(
    config: PretrainedConfig, row: int, length: int, image_tokens: int, generator: torch.Generator
) -> Prompt:
    """image_tokens: about as many; 0: text alone."""
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
    """[count] int64, of the text's; the special ones come after them."""
    return torch.randint(config.vision_start_token_id - 16, (count,), generator=generator)


# The measurement.


def timed_step(engine: PolicyEngine, batch: RolloutBatch, options: ModelConfig, world: World, roof: float) -> dict:
    """One update: seconds of it and of its phases, GiB (at its peak, and held before it), rates."""
    held = start_of_memory(world)
    clock = Stopwatch(world.device)
    stats = engine.update(batch, PolicyLossConfig(), clock=clock)
    seconds = sum(clock.seconds[phase] for phase in PHASES)
    peak = peak_bytes(clock, world)
    rates = utilisation(work_of_step(engine.policy, options, batch, [stats]), clock, world, roof)
    return {
        "seconds": seconds,
        **{f"{phase}_seconds": clock.seconds[phase] for phase in PHASES},
        "tokens_per_second": tokens_of(batch) / seconds,
        "tflops": rates["perf/update_tflops"],
        "hardware_tflops": rates["perf/hardware_tflops"],
        "mfu": rates["perf/mfu"],
        "peak_gib": peak / GIB,
        "held_gib": held / GIB,
        "extra_gib": (peak - held) / GIB,
    }


def tokens_of(batch: RolloutBatch) -> int:
    return sum(len(prompt.token_ids) for prompt in batch.prompts) + int(batch.lengths.sum())


def start_of_memory(world: World) -> int:
    """Bytes that are held between steps; from here on the peak counts anew."""
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    heap.trim()  # what was freed before must not pass for memory that is there anyway
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present resident set
    return resident_bytes("VmRSS")


def peak_bytes(clock: Stopwatch, world: World) -> int:
    """On CUDA that of the phases, at whose start the stopwatch resets it; on a CPU that of the resident set."""
    if world.device.type == "cuda":
        return int(max(clock.memory[f"memory/{phase}_gib"] for phase in PHASES) * GIB)
    return resident_bytes("VmHWM")


def device_tflops(device: torch.device, dtype: str) -> tuple[float, str]:
    """What the device can do, and how that is known."""
    known = peak_tflops(device, None)
    return (known, "data sheet") if known else (product_tflops(dtype, device), "a large product, measured beforehand")


def product_tflops(dtype: str, device: torch.device, size: int = 2048) -> float:
    a, b = (torch.randn(size, size, dtype=getattr(torch, dtype), device=device) for _ in range(2))
    seconds = []
    for _ in range(4):  # the first one warms up
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:]) / 1e12


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
