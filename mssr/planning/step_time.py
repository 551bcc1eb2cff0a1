"""Seconds of a step by phase: what the hardware would need at the shares of its peak that ASSUMED says. Not measured."""

import math
from dataclasses import dataclass

from transformers import PretrainedConfig

from mssr.config import Config
from mssr.observe.flops import countable, forward_flops
from mssr.observe.gpu import Gpu
from mssr.planning.memory import Machine, Memory, plan_dtype, vllm_weight_bytes
from mssr.planning.workload import Workload
from mssr.planning.zero import FP32, Zero
from mssr.policy.deepspeed_settings import deepspeed_settings

GIGA = 1e9


@dataclass(frozen=True)
class Shares:
    """Of the device's peak rates that a phase reaches; host: GB/s of the CPU's AdamW, pcie: of copies to the host."""

    training: float = 0.45
    scoring: float = 0.5
    decoding: float = 0.6
    streaming: float = 0.7
    link: float = 0.6
    host: float = 20.0
    pcie: float = 20.0


ASSUMED = Shares()


@dataclass(frozen=True)
class StepTime:
    """seconds: by phase. concurrent: responses that vLLM decodes at once on a rank. notes: what the numbers stand on."""

    seconds: dict[str, float]
    concurrent: int
    notes: tuple[str, ...]

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def step_time(
    config: Config, model: PretrainedConfig, workload: Workload, memory: Memory, machine: Machine, gpu: Gpu
) -> StepTime | None:
    """One step at the workload's mean lengths; None for an architecture whose FLOPs are not known."""
    if not countable(model):
        return None
    rows = math.ceil(config.responses_per_step / machine.gpus)
    grid = workload.grid(model)
    grids = [grid] if grid else []
    per_row = forward_flops(model, [workload.tokens], workload.response, grids)
    one_pass = rows * per_row.forward / (gpu.tflops * 1e12 * ASSUMED.scoring)
    seconds, concurrent = _sampling(config, model, workload, memory, machine, gpu, rows)
    scored = {
        "old_logp": config.algorithm.old_logp == "recompute",
        "reference": config.algorithm.kl_coef > 0,
        "drift": config.algorithm.rescores_responses,
    }
    seconds |= {phase: one_pass for phase, wanted in scored.items() if wanted}
    if config.loads_reference and config.model.reference == "cpu":
        parameters = memory.parameters
        seconds["reference"] += parameters.total * parameters.itemsize / GIGA / ASSUMED.pcie
    left_out = {"train_vision": config.model.train_vision, "lora": config.model.lora is not None}
    flops = per_row.forward + per_row.backward(**left_out)
    if config.model.gradient_checkpointing:
        flops += per_row.recomputed(**left_out)
    seconds["forward_backward"] = rows * flops / (gpu.tflops * 1e12 * ASSUMED.training)
    communication, optimizer = _updates(config, workload, memory, machine, gpu, rows)
    seconds["forward_backward"] += communication
    seconds["optimizer"] = optimizer
    return StepTime(seconds, concurrent, _notes())


def _sampling(
    config: Config, model: PretrainedConfig, workload: Workload, memory: Memory, machine: Machine, gpu: Gpu, rows: int
) -> tuple[dict[str, float], int]:
    """(seconds of sync and generate, responses decoded at once)"""
    parameters, tensor_parallel = memory.parameters, config.rollout.tensor_parallel
    text = model.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    itemsize = min(parameters.itemsize, 2)
    token_bytes = 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim * itemsize / tensor_parallel
    weights = vllm_weight_bytes(config, parameters)
    room = memory.phases["generate"].get("vLLM KV cache, activations")
    if room is None:  # servers, or generate itself: all that the device has beside the weights
        room = config.rollout.gpu_memory * (machine.memory or 0) - weights
    mean_context = workload.prompt + workload.response / 2
    together = rows * tensor_parallel
    fitting = max(1, int(0.9 * room / (token_bytes * mean_context)))
    concurrent = min(fitting, config.rollout.batch_size * tensor_parallel, together)
    bandwidth = gpu.bandwidth * GIGA * ASSUMED.decoding
    matmul = 2 * parameters.total * concurrent / tensor_parallel / (gpu.tflops * 1e12 * ASSUMED.scoring)
    token_seconds = max((weights + concurrent * token_bytes * mean_context) / bandwidth, matmul)
    decode = together / concurrent * workload.response * token_seconds
    prompt = forward_flops(model, [workload.prompt], 1, [workload.grid(model)] if workload.image else [])
    prefill = rows * prompt.forward / (gpu.tflops * 1e12 * ASSUMED.scoring)
    size = parameters.total * parameters.itemsize
    sync = 3 * size / (gpu.bandwidth * GIGA * ASSUMED.streaming)  # read, written, and once more on the way
    if config.train.zero_stage == 3 and machine.gpus > 1:
        sync += size / (gpu.link * GIGA * ASSUMED.link)
    return {"sync": sync, "generate": decode + prefill}, concurrent


def _updates(
    config: Config, workload: Workload, memory: Memory, machine: Machine, gpu: Gpu, rows: int
) -> tuple[float, float]:
    """(seconds of collectives in forward and backward passes, seconds of the optimizer), of all updates of a step"""
    parameters, ranks, updates = memory.parameters, machine.gpus, config.updates_per_step
    zero = Zero.of(deepspeed_settings(config.train.optimizer, config.train, plan_dtype(config, machine)))
    micro_batches = updates * math.ceil(rows / updates * workload.tokens / config.train.micro_batch_tokens)
    link = gpu.link * GIGA * ASSUMED.link
    own = parameters.trained / (ranks if zero.stage else 1)
    gradients, weights = parameters.trained * parameters.itemsize, parameters.total * parameters.itemsize
    communication = 0.0
    if ranks > 1:
        communication += gradients / link * (updates if zero.stage < 2 else micro_batches)
        if zero.stage == 3:
            communication += 2 * weights / link * micro_batches
    if zero.offload_param:
        communication += 2 * weights / ranks / GIGA / ASSUMED.pcie * micro_batches
    # Masters and moments are read and written, gradients read, weights written.
    moved = own * (6 * FP32 + FP32 + parameters.itemsize)
    rate = GIGA * ASSUMED.host if zero.offload_optimizer else gpu.bandwidth * GIGA * ASSUMED.streaming
    optimizer = moved / rate
    if ranks > 1 and zero.stage in (1, 2):
        optimizer += gradients / link
    if config.rollout.offload_optimizer:
        optimizer += 2 * own * 3 * FP32 / GIGA / ASSUMED.pcie / updates
    return communication, optimizer * updates


def _notes() -> tuple[str, ...]:
    shares = ASSUMED
    return (
        f"matrix products at {shares.training:.0%} of the peak in training and {shares.scoring:.0%} in scoring, "
        f"decoding at {shares.decoding:.0%} of the memory's bandwidth",
        f"collectives at {shares.link:.0%} of the link and not overlapped; host copies {shares.pcie:.0f} GB/s, "
        f"AdamW on the CPU {shares.host:.0f} GB/s",
        "every response as long as the mean: long ones that others wait for are not in it",
    )
