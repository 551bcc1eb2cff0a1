"""Memory of one rank by phase and part, on its device and in host memory.

The parts are those at the phase's peak, so they add up to it.
"""

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from mssr.config import Config
from mssr.config.resolve import dtype_name, planned_engine
from mssr.planning.trace import MicroBatchShape, Trace, planned_policy, trace
from mssr.planning.zero import FP32, Parameters, TrainerState, Zero, offloaded, trainer_state
from mssr.policy.deepspeed_settings import deepspeed_settings
from mssr.policy.weights import BUCKET_BYTES
from mssr.stopwatch import GIB

CONTEXT_BYTES = int(1.5 * GIB)  # assumed: CUDA context, cuBLAS workspaces, NCCL's buffers


@dataclass(frozen=True)
class Machine:
    """device: "cuda" or "cpu". gpus: ranks, one per GPU. memory: bytes of one device; None: not considered."""

    device: str
    gpus: int
    memory: int | None = None


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. phases: phase -> part -> bytes on the device. host: part -> bytes in host memory."""

    phases: dict[str, dict[str, int]]
    host: dict[str, int]
    parameters: Parameters

    def total(self, phase: str) -> int:
        return sum(self.phases[phase].values())

    @property
    def worst(self) -> str:
        return max(self.phases, key=self.total)

    @property
    def peak(self) -> int:
        return self.total(self.worst)


class MemoryPlanner:
    """Predicts memory; caches the traces, which take most of the time."""

    def __init__(self, model: PretrainedConfig, machine: Machine) -> None:
        self._model, self._machine = model, machine
        self._traces: dict[tuple, tuple[Parameters, Trace]] = {}

    def predict(self, config: Config, shape: MicroBatchShape, *, micro_batches: int = 2) -> Memory:
        """shape: of a micro-batch. micro_batches: per update; from 2 on, gradients of earlier ones are kept."""
        dtype = plan_dtype(config, self._machine)
        zero = Zero.of(deepspeed_settings(config.train.optimizer, config.train, dtype))
        parameters, micro_batch = self._traced(config, dtype, shape, zero.stage == 0, micro_batches)
        state = trainer_state(
            parameters, zero, self._machine.gpus, eager=self._machine.device == "cuda", micro_batches=micro_batches
        )
        state, offloaded_bytes = offloaded(state, parameters, zero, self._machine.gpus)
        resident = {"weights": state.weights, "fp32 masters": state.masters, "AdamW moments": state.moments}
        if self._machine.device == "cuda":
            resident |= {"CUDA context, libraries": CONTEXT_BYTES}
        resident["reference"], reference_in_pass, reference_host = self._reference(config, parameters)
        phases = {
            "scoring": resident
            | {
                "one pass": micro_batch.scoring,
                "gathered weights": state.gathered,
                "reference in its pass": reference_in_pass,
            },
            "forward_backward": resident | _forward_backward(state, micro_batch),
            "optimizer": resident | {"gradients": state.stepping},
        }
        phases = {"generate": self._generate(config, resident, parameters, zero)} | phases
        phases = {phase: {part: size for part, size in parts.items() if size} for phase, parts in phases.items()}
        host = {
            "offloaded by DeepSpeed": offloaded_bytes,
            "optimizer while generating": (state.masters + state.moments) * config.rollout.offload_optimizer,
            "copy for saving": _saved_copy(config, parameters, self._machine.gpus),
            "reference": reference_host,
            "prompts": int(config.data.cache_gib * GIB) * (1 + (config.data.val is not None)),
        }
        return Memory(phases, {part: size for part, size in host.items() if size}, parameters)

    def _traced(
        self, config: Config, dtype: torch.dtype, shape: MicroBatchShape, accumulated: bool, micro_batches: int
    ) -> tuple[Parameters, Trace]:
        options = config.model
        # Whether flash-attn is installed on the machine that is planned for is not known here.
        padded = options.attention != "flash"
        key = (options.model_dump_json(), dtype, shape, accumulated, micro_batches)
        if key not in self._traces:
            policy = planned_policy(self._model, dtype, options, padded=padded)
            sizes = [(each.numel(), each.requires_grad) for each in policy.parameters()]
            parameters = Parameters(
                total=sum(size for size, _ in sizes),
                trained=sum(size for size, trained in sizes if trained),
                largest=max(size for size, _ in sizes),
                itemsize=dtype.itemsize,
            )
            seen = trace(
                policy, shape, device=self._machine.device, accumulated=accumulated, micro_batches=micro_batches
            )
            self._traces[key] = parameters, seen
        return self._traces[key]

    def _reference(self, config: Config, parameters: Parameters) -> tuple[int, int, int]:
        """(bytes on the device all the time, more during its pass, bytes in host memory)"""
        size = parameters.total * parameters.itemsize if config.loads_reference else 0
        ranks = self._machine.gpus
        if config.model.reference == "copy":
            return size, 0, 0
        if config.model.reference == "cpu":
            return 0, size * (self._machine.device == "cuda"), size
        zero = Zero(3)
        live = min(size, (zero.max_live + zero.prefetch_bucket) * parameters.itemsize)
        return -(-size // ranks), live * (ranks > 1), 0

    def _generate(self, config: Config, resident: dict[str, int], parameters: Parameters, zero: Zero) -> dict[str, int]:
        parts = dict(resident)
        rollout = config.rollout
        if rollout.offload_optimizer:
            parts |= {"fp32 masters": 0, "AdamW moments": 0}
        if rollout.engine == "servers":
            return parts
        size = parameters.total * parameters.itemsize
        if zero.stage == 3:
            parts["weights gathered for the sync"] = min(size, int(rollout.sync_gib * GIB))
        if self._machine.device == "cuda" and planned_engine(rollout.engine) == "vllm":
            weights = vllm_weight_bytes(config, parameters)
            room = int(rollout.gpu_memory * (self._machine.memory or 0))
            return parts | {"vLLM weights": weights, "vLLM KV cache, activations": max(0, room - weights)}
        if zero.stage == 3:  # a full copy generates
            parts |= {"weights gathered for the sync": min(size, BUCKET_BYTES), "full copy that generates": size}
        return parts


def _forward_backward(state: TrainerState, micro_batch: Trace) -> dict[str, int]:
    """Parts at the larger of two moments: the peak of activations, or the end, where only gradients are left to reduce."""
    begin = micro_batch.peak + state.gradients + state.reducing + state.gathered
    end = state.gradients + state.last_reduction
    if end > begin:
        return {"gradients": state.gradients, "gradients being reduced": state.last_reduction}
    return {
        "activations": micro_batch.kept,
        "one layer, its gradients": micro_batch.peak - micro_batch.kept,
        "gradients": state.gradients,
        "gradients being reduced": state.reducing,
        "gathered weights": state.gathered,
    }


def vllm_weight_bytes(config: Config, parameters: Parameters) -> int:
    """Bytes of vLLM's own copy on one GPU."""
    itemsize = 1 if config.rollout.quantization == "fp8" else min(parameters.itemsize, 2)
    return parameters.total * itemsize // config.rollout.tensor_parallel


def plan_dtype(config: Config, machine: Machine) -> torch.dtype:
    return getattr(torch, dtype_name(config.model.dtype, machine.device))


def _saved_copy(config: Config, parameters: Parameters, ranks: int) -> int:
    """Bytes of this rank's masters and moments, copied for train.async_save."""
    return 3 * FP32 * -(-parameters.trained // ranks) if config.train.async_save else 0
