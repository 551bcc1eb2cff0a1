"""One model and mode of `bench.sync`, in a process for each rank; the first rank prints what was measured.

python -m bench.sync_case, with {"size": "tiny", "mode": "zero0", ...} on standard input
"""

import gc
import json
import os
import statistics
import sys
from collections.abc import Callable

import mssr.environment  # noqa: F401  first, as in mssr.cli  # isort: skip
import torch
from transformers import AutoConfig, PretrainedConfig, Qwen2VLImageProcessorPil

from examples.tiny.model import train_tokenizer
from mssr.config import Config, validate_config
from mssr.distributed import World, free_port, start_world
from mssr.policy.engine import PolicyEngine
from mssr.policy.model import Policy
from mssr.policy.weights import weight_shapes
from mssr.rollout.vllm.engine import VLLMRollout

from . import heap, models
from .child import say
from .memory import MIB, peak_extra_bytes
from .roofs import seconds_of

TOKENS = 64  # of a prompt and of a response: a sync does not depend on them, but vLLM's start does


def main(case: dict):
    os.environ.update(WORLD_SIZE=str(case["ranks"]), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    torch.multiprocessing.spawn(run_rank, (case,), case["ranks"])  # a rank that fails ends the others


def run_rank(rank: int, case: dict):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    world = start_world(case["device"])
    found = measure(world, case)
    if world.is_main:
        say(**found)


def measure(world: World, case: dict) -> dict:
    """case: size, mode, device, dtype, repeats, and the path of a folder for the model, which is made here."""
    if world.is_main:
        write_model(case)
    torch.distributed.barrier()
    policy, _engine = make_policy(world, case)
    if world.device.type == "cuda":
        start_eager()
    rollout = VLLMRollout(run_config(case), policy, [0], 0, world)

    def sync():
        rollout.update_weights(policy, 0)

    seconds = []
    for _ in range(case["repeats"] + 1):
        rollout.release()
        seconds.append(max(world.gather(timed(sync, world))))
    seconds = seconds[1:]  # the first one warms up
    if world.device.type == "cpu":  # else glibc keeps much of what a sync frees, layer after layer
        heap.give_back()
    memory = max(max(world.gather(peak_extra(sync, world))) for _ in range(case["repeats"]))
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
    }


def timed(call: Callable[[], None], world: World) -> float:
    gc.collect()
    torch.distributed.barrier()
    return seconds_of(call, world.device.type)


def peak_extra(call: Callable[[], None], world: World) -> int:
    """Return the bytes at the peak of a call. vLLM is awake before, so its own weights and cache do not count."""
    torch.distributed.barrier()
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


def make_policy(world: World, case: dict) -> tuple[Policy, PolicyEngine | None]:
    """Return the policy, and the engine that must live as long. zero0 has no engine; it syncs the same weights."""
    if case["mode"] == "zero0":
        config, dtype = AutoConfig.from_pretrained(case["folder"]), getattr(torch, case["dtype"])
        return models.random_policy(config, dtype, world.device).requires_grad_(False).eval(), None
    settings = run_config(case)
    engine = PolicyEngine(
        settings.model, settings.train.optimizer, settings.train, world, temperature=1.0, total_updates=1
    )
    return engine.policy, engine


def write_model(case: dict):
    """Write config, a small tokenizer and the image processor; weights only for a DeepSpeed engine, which reads them."""
    tokenizer = train_tokenizer(["Which digit is larger?"], 300)
    tokenizer.save_pretrained(case["folder"])
    Qwen2VLImageProcessorPil().save_pretrained(case["folder"])
    config = model_config(case["size"], tokenizer, case["dtype"])
    config.save_pretrained(case["folder"])
    if case["mode"] != "zero0":
        policy = models.random_policy(config, getattr(torch, case["dtype"]), torch.device("cpu"))
        policy.model.save_pretrained(case["folder"])


def model_config(size: str, tokenizer, dtype: str) -> PretrainedConfig:
    token = tokenizer.convert_tokens_to_ids
    return models.config(
        size, dtype=dtype, architectures=["Qwen2_5_VLForConditionalGeneration"],
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"),
        text={"eos_token_id": token("<|im_end|>"), "pad_token_id": token("<|endoftext|>")},
    )  # fmt: skip


def run_config(case: dict) -> Config:
    rollout = {"engine": "vllm", "max_response_tokens": TOKENS, "batch_size": 4}
    train = {"micro_batch_tokens": TOKENS, "zero_stage": int(case["mode"].removeprefix("zero"))}
    return validate_config({
        "run_dir": case["folder"], "model": {"path": case["folder"], "dtype": case["dtype"]}, "train": train,
        "data": {"train": "unused", "max_prompt_tokens": TOKENS}, "rollout": rollout,
    })  # fmt: skip


if __name__ == "__main__":
    main(json.load(sys.stdin))
