"""One size and mode of `bench.sync`, in the process of each of its ranks; the first rank prints what was measured.

RANK=0 WORLD_SIZE=1 ... python -m bench.sync_case '{"size": "tiny", "mode": "zero0", ...}'
"""

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch

from . import heap
from .memory import MIB, resident_bytes

GIB = 1 << 30
TOKENS = 64  # of a prompt, of a response: the sync does not depend on them, vLLM's start does


class Size(NamedTuple):
    """A Qwen2.5-VL. about: its parameters, to see beforehand whether they fit."""

    about: float
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    vision_hidden: int
    vision_intermediate: int
    vision_layers: int
    vision_heads: int


SIZES = {
    "tiny": Size(1.2e6, 128, 256, 2, 4, 1, 512, 128, 256, 2, 4),
    "20m": Size(21e6, 384, 1024, 6, 6, 1, 8192, 256, 768, 4, 4),
    "100m": Size(112e6, 768, 2304, 8, 12, 3, 16384, 512, 1408, 8, 8),
    "500m": Size(530e6, 1280, 3840, 18, 20, 5, 32768, 768, 2304, 12, 12),
    "7b": Size(8.3e9, 3584, 18944, 28, 28, 4, 152064, 1280, 3420, 32, 16),
}


def main(case: dict):
    from mssr.distributed import start_world

    world = start_world(case["device"])
    result = measure(world, case)
    if world.is_main:
        print(json.dumps(result), flush=True)


def measure(world, case: dict) -> dict:
    """case: size, mode, device, dtype, sync_gib, repeats, per_parameter, and a folder for the model, empty at first."""
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
    bucket_bytes = int(case["sync_gib"] * GIB)

    def ours():
        rollout.update_weights(policy, 0)

    def one_by_one():
        with patch("mssr.rollout.vllm.engine.sync_weights", sync_one_by_one):
            rollout.update_weights(policy, 0)

    def gather():
        for _ in weight_sync.named_weights(policy, bucket_bytes):
            pass

    ways = {"sync": ours} | ({"per_parameter": one_by_one} if case["per_parameter"] else {})
    seconds = {name: [] for name in ways}
    for turn in range(case["repeats"] + 1):  # the first one warms up
        for name, way in ways.items():
            rollout.release()
            found = max(world.gather(timed(way, world)))
            if turn:
                seconds[name].append(found)
    resident = resident_bytes("VmHWM")  # what follows resets it
    kept = peak_extras(ours, world, case)
    with giving_back_what_is_freed():
        memory = {name: peak_extras(way, world, case) for name, way in {**ways, "gather": gather}.items()}
    weights = weight_shapes(policy).values()
    sizes = [shape.numel() * dtype.itemsize for shape, dtype in weights]
    result = {
        "parameters": sum(shape.numel() for shape, _ in weights),
        "tensors": len(sizes),
        "bytes": sum(sizes),
        "largest_tensor_mib": max(sizes) / MIB,
        "threads": torch.get_num_threads(),
        "seconds": statistics.median(seconds["sync"]),
        "seconds_spread": [min(seconds["sync"]), max(seconds["sync"])],
        "bytes_per_second": sum(sizes) / statistics.median(seconds["sync"]),
        "peak_extra_mib": memory["sync"] / MIB,
        "peak_extra_mib_of_gathering": memory["gather"] / MIB,
        "peak_extra_mib_with_heap": kept / MIB,
        "resident_gib": sum(world.gather(resident)) / GIB,
    }
    if case["per_parameter"]:
        turns = [own / other for own, other in zip(seconds["sync"], seconds["per_parameter"])]
        result["per_parameter"] = {
            "seconds": statistics.median(seconds["per_parameter"]),
            "seconds_spread": [min(seconds["per_parameter"]), max(seconds["per_parameter"])],
            "peak_extra_mib": memory["per_parameter"] / MIB,
            "time_ratio": statistics.median(turns),
        }
    return result


def timed(call: Callable[[], None], world) -> float:
    gc.collect()
    world.barrier()
    synchronize(world)
    start = time.perf_counter()
    call()
    synchronize(world)
    return time.perf_counter() - start


def peak_extras(call: Callable[[], None], world, case: dict) -> int:
    """The largest of all repeats on all ranks."""
    return max(max(world.gather(peak_extra(call, world))) for _ in range(case["repeats"]))


def peak_extra(call: Callable[[], None], world) -> int:
    """Bytes at the peak of a call that finds vLLM awake, so that its own weights and cache do not count."""
    gc.collect()
    world.barrier()
    if world.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        allocated, free = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
        call()
        torch.cuda.synchronize()
        # What the allocator took from the device in the call it still has; what did not go through it shows here too.
        return max(torch.cuda.max_memory_allocated() - allocated, free - torch.cuda.mem_get_info()[0])
    heap.trim()  # what was freed before must not pass for memory that is there anyway
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present resident set
    before = resident_bytes("VmRSS")
    call()
    return resident_bytes("VmHWM") - before


@contextmanager
def giving_back_what_is_freed():
    """glibc's heap keeps much of what a sync frees, layer after layer, which hides what the sync needs: in here it is trimmed
    after every weight and every gathering."""
    from mssr.policy import weights
    from mssr.rollout import weight_sync

    named_weights, gathered = weights.named_weights, weights.gathered

    def trimming_weights(policy, bucket_bytes: int):
        for pair in named_weights(policy, bucket_bytes):
            yield pair
            heap.trim()

    @contextmanager
    def trimming_gathered(parameters):
        with gathered(parameters):
            yield
        heap.trim()

    with (
        patch.object(weight_sync, "named_weights", trimming_weights),
        patch.object(weights, "gathered", trimming_gathered),
    ):
        yield


def synchronize(world):
    if world.device.type == "cuda":
        torch.cuda.synchronize()


def sync_one_by_one(llm, policy, **_):
    """`sync_weights` as trainers commonly write it: one gathering and one call of vLLM's `load_weights` a parameter.

    On a CPU vLLM repacks linear layers and can load into them again only within a reload, so there is one around it all.
    """
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    from mssr.rollout import weight_sync

    def load(worker):
        model, repacked = worker.model_runner.get_model(), next(policy.parameters()).device.type == "cpu"
        if repacked:
            initialize_layerwise_reload(model)
        for name, weight in weight_sync.named_weights(policy, 1):  # a limit that every parameter is over
            model.load_weights([(name, weight)])
        if repacked:
            finalize_layerwise_reload(model, worker.model_runner.model_config)

    llm.collective_rpc(load)
    weight_sync.reset_caches(llm)


def start_eager():
    """Compiling and capturing graphs takes a minute and changes nothing about a sync."""
    import vllm

    whole = vllm.LLM
    vllm.LLM = lambda **settings: whole(**settings | {"enforce_eager": True})


# The model.


def make_policy(world, case: dict) -> tuple:
    """(policy, the engine that has to live as long). Without ZeRO the frozen policy alone: what is synced is the same."""
    if case["mode"] == "zero0":
        return random_policy(case, world.device), None
    from mssr.config import ModelConfig, OptimizerConfig, TrainConfig
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
    """Config, a small tokenizer and the image processor; weights for a DeepSpeed engine only, which reads them."""
    from transformers import Qwen2VLImageProcessorPil

    from examples.digits.tiny_model import train_tokenizer

    tokenizer = train_tokenizer(["Which digit is larger?"], 300)
    tokenizer.save_pretrained(case["folder"])
    Qwen2VLImageProcessorPil().save_pretrained(case["folder"])
    model_config(SIZES[case["size"]], tokenizer, case["dtype"]).save_pretrained(case["folder"])
    if case["mode"] != "zero0":
        random_policy(case, torch.device("cpu")).model.save_pretrained(case["folder"])


def model_config(size: Size, tokenizer, dtype: str):
    from transformers import Qwen2_5_VLConfig

    half = size.hidden // size.heads // 2
    token = tokenizer.convert_tokens_to_ids
    text = dict(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [half // 4, half * 3 // 8, half * 3 // 8],
        },
        bos_token_id=None,
        eos_token_id=token("<|im_end|>"),
        pad_token_id=token("<|endoftext|>"),
    )
    vision = dict(
        depth=size.vision_layers,
        hidden_size=size.vision_hidden,
        intermediate_size=size.vision_intermediate,
        num_heads=size.vision_heads,
        out_hidden_size=size.hidden,
        fullatt_block_indexes=list(range(size.vision_layers))[3::4],
    )
    return Qwen2_5_VLConfig(
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        dtype=dtype,
        text_config=text,
        vision_config=vision,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        tie_word_embeddings=False,
    )


def run_config(case: dict):
    from mssr.config import validate_config

    rollout = {"engine": "vllm", "max_response_tokens": TOKENS, "batch_size": 4, "sync_gib": case["sync_gib"]}
    return validate_config({
        "run_dir": case["folder"], "model": {"path": case["folder"], "dtype": case["dtype"]},
        "data": {"train": "unused", "max_prompt_tokens": TOKENS}, "rollout": rollout,
    })  # fmt: skip


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
