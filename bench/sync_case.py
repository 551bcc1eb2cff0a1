"""One size and mode of `bench.sync`, in the process of each of its ranks; the first rank prints what was measured.

python -m bench.sync_case, with {"size": "tiny", "mode": "zero0", ...} on standard input
"""

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch

from . import heap, models
from .child import say
from .memory import GIB, MIB, peak_extra_bytes, resident_bytes
from .models import Size
from .roofs import synchronize

TOKENS = 64  # of a prompt and of a response: a sync does not depend on them, but vLLM's start does


# With the number of parameters, to see beforehand whether they fit.
SIZES = {
    "tiny": (1.2e6, Size(128, 256, 2, 4, 1, 512)),
    "20m": (21e6, Size(384, 1024, 6, 6, 1, 8192, 256, 768, 4, 4)),
    "100m": (112e6, Size(768, 2304, 8, 12, 3, 16384, 512, 1408, 8, 8)),
    "500m": (530e6, Size(1280, 3840, 18, 20, 5, 32768, 768, 2304, 12, 12)),
    "7b": (8.3e9, Size(3584, 18944, 28, 28, 4, 152064, 1280, 3420, 32, 16)),
}


def main(case: dict):
    from mssr.distributed import start_world

    world = start_world(case["device"])
    found = measure(world, case)
    if world.is_main:
        say(**found)


def measure(world, case: dict) -> dict:
    """case: size, mode, device, dtype, sync_gib, repeats, and the path of a folder for the model, which is made here."""
    from mssr.policy.weights import weight_shapes
    from mssr.rollout import weight_sync
    from mssr.rollout.vllm.engine import VLLMRollout

    if world.is_main:
        write_model(case)
    world.barrier()
    policy, _engine = make_policy(world, case)
    if world.device.type == "cuda":
        start_eager()
    rollout = VLLMRollout(run_config(case), policy, [0], 0, world)

    def sync():
        rollout.update_weights(policy, 0)

    def gather():
        for _ in weight_sync.named_weights(policy, int(case["sync_gib"] * GIB)):
            pass

    seconds = []
    for _ in range(case["repeats"] + 1):
        rollout.release()
        seconds.append(max(world.gather(timed(sync, world))))
    seconds = seconds[1:]  # the first one warms up
    resident = resident_bytes("VmHWM")  # read before the peak is reset
    if world.device.type == "cpu":  # else glibc keeps much of what a sync frees, layer after layer
        heap.give_back()
    memory, gathering = (peak_extras(call, world, case) for call in (sync, gather))
    weights = weight_shapes(policy).values()
    sizes = [shape.numel() * dtype.itemsize for shape, dtype in weights]
    return {
        "parameters": sum(shape.numel() for shape, _ in weights),
        "bytes": sum(sizes),
        "threads": torch.get_num_threads(),
        "seconds": statistics.median(seconds),
        "seconds_spread": [min(seconds), max(seconds)],
        "bytes_per_second": sum(sizes) / statistics.median(seconds),
        "peak_extra_mib": memory / MIB,
        "peak_extra_mib_of_gathering": gathering / MIB,
        "resident_gib": sum(world.gather(resident)) / GIB,
    }


def timed(call: Callable[[], None], world) -> float:
    gc.collect()
    world.barrier()
    synchronize(world.device.type)
    start = time.perf_counter()
    call()
    synchronize(world.device.type)
    return time.perf_counter() - start


def peak_extras(call: Callable[[], None], world, case: dict) -> int:
    """Return the largest peak of all repeats on all ranks."""
    return max(max(world.gather(peak_extra(call, world))) for _ in range(case["repeats"]))


def peak_extra(call: Callable[[], None], world) -> int:
    """Return the bytes at the peak of a call. vLLM is awake before, so its own weights and cache do not count."""
    world.barrier()
    if world.device.type != "cuda":
        return peak_extra_bytes(call, "cpu")
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    # The second term includes what did not go through torch's allocator, which keeps what it took from the device.
    return max(peak_extra_bytes(call, "cuda"), free - torch.cuda.mem_get_info()[0])


def start_eager():
    """Skip vLLM's compilation and graph capture, which take a minute and do not affect a sync."""
    import vllm

    whole = vllm.LLM
    vllm.LLM = lambda **settings: whole(**settings | {"enforce_eager": True})


# The model.


def make_policy(world, case: dict) -> tuple:
    """Return (policy, the engine that must live as long). zero0 is the frozen policy alone; it syncs the same weights."""
    if case["mode"] == "zero0":
        return random_policy(case, world.device), None
    from mssr.config.schema import ModelConfig, OptimizerConfig, TrainConfig
    from mssr.policy.engine import PolicyEngine

    engine = PolicyEngine(
        ModelConfig(path=case["folder"], dtype=case["dtype"]),
        OptimizerConfig(),
        TrainConfig(micro_batch_tokens=TOKENS, zero_stage=int(case["mode"].removeprefix("zero"))),
        world,
        temperature=1.0,
        total_updates=1,
    )
    return engine.policy, engine


def random_policy(case: dict, device: torch.device):
    from transformers import AutoConfig, AutoModelForImageTextToText

    from mssr.policy import attention
    from mssr.policy.model import Policy

    config, dtype = AutoConfig.from_pretrained(case["folder"]), getattr(torch, case["dtype"])
    with device:
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation=attention.SDPA)
    return Policy(model).requires_grad_(False).eval()


def write_model(case: dict):
    """Write config, a small tokenizer and the image processor; weights only for a DeepSpeed engine, which reads them."""
    from transformers import Qwen2VLImageProcessorPil

    from examples.digits.tiny_model import train_tokenizer

    tokenizer = train_tokenizer(["Which digit is larger?"], 300)
    tokenizer.save_pretrained(case["folder"])
    Qwen2VLImageProcessorPil().save_pretrained(case["folder"])
    model_config(SIZES[case["size"]][1], tokenizer, case["dtype"]).save_pretrained(case["folder"])
    if case["mode"] != "zero0":
        random_policy(case, torch.device("cpu")).model.save_pretrained(case["folder"])


def model_config(size: Size, tokenizer, dtype: str):
    token = tokenizer.convert_tokens_to_ids
    return models.config(
        size, dtype, image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"),
        text={"eos_token_id": token("<|im_end|>"), "pad_token_id": token("<|endoftext|>")},
    )  # fmt: skip


def run_config(case: dict):
    from mssr.config import validate_config

    rollout = {"engine": "vllm", "max_response_tokens": TOKENS, "batch_size": 4, "sync_gib": case["sync_gib"]}
    return validate_config({
        "run_dir": case["folder"], "model": {"path": case["folder"], "dtype": case["dtype"]},
        "data": {"train": "unused", "max_prompt_tokens": TOKENS}, "rollout": rollout,
    })  # fmt: skip


if __name__ == "__main__":
    main(json.load(sys.stdin))
