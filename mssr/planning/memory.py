"""Memory of one rank by phase and part, on its device and in host memory.

The parts are those at the phase's peak, so they add up to it.
"""

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from mssr.config import Config
from mssr.config.resolve import dtype_name, planned_engine
from mssr.observe.gpu import Gpu
from mssr.planning.trace import MicroBatchShape, Trace, planned_policy, trace
from mssr.planning.zero import FP32, Parameters, TrainerState, trainer_state, zero_settings
from mssr.policy.weights import BUCKET_BYTES
from mssr.stopwatch import GIB

CONTEXT_BYTES = int(1.5 * GIB)  # assumed: CUDA context, cuBLAS workspaces, NCCL's buffers
# Elements of a sharded reference that DeepSpeed by default keeps gathered at once, and those it fetches ahead.
GATHERED_REFERENCE = 1_000_000_000 + 50_000_000


@dataclass(frozen=True)
class Machine:
    """gpus: ranks, one per GPU. gpu: its data sheet; None: the ranks are on a CPU, whose memory is not considered."""

    gpus: int
    gpu: Gpu | None = None

    @property
    def device(self) -> str:
        return "cuda" if self.gpu else "cpu"

    @property
    def memory(self) -> int:
        """Bytes of one GPU."""
        return int(self.gpu.memory_gib * GIB) if self.gpu else 0


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
        ranks, cuda = self._machine.gpus, self._machine.device == "cuda"
        zero = zero_settings(config, plan_dtype(config, self._machine))
        parameters, micro_batch = self._traced(config, shape, zero.stage == 0, micro_batches)
        state = trainer_state(parameters, zero, ranks, eager=cuda, micro_batches=micro_batches)
        reference, reference_in_pass, reference_host = self._reference(config, parameters)
        resident = {
            "weights": state.weights,
            "fp32 masters": state.masters,
            "AdamW moments": state.moments,
            "CUDA context, libraries": CONTEXT_BYTES * cuda,
            "reference": reference,
        }
        scoring = {
            "one pass": micro_batch.scoring,
            "gathered weights": state.gathered,
            "reference in its pass": reference_in_pass,
        }
        phases = {
            "generate": self._generate(config, resident, parameters),
            "scoring": resident | scoring,
            "forward_backward": resident | _forward_backward(state, micro_batch),
            "optimizer": resident | {"gradients": state.stepping},
        }
        host = {
            "offloaded by DeepSpeed": state.host,
            "optimizer while generating": (state.masters + state.moments) * config.rollout.offload_optimizer,
            "copy for saving": 3 * FP32 * -(-parameters.trained // ranks) * config.train.async_save,
            "reference": reference_host,
            "prompts": int(config.data.cache_gib * GIB) * (1 + (config.data.val is not None)),
        }
        return Memory({phase: _present(parts) for phase, parts in phases.items()}, _present(host), parameters)

    def _traced(
        self, config: Config, shape: MicroBatchShape, accumulated: bool, micro_batches: int
    ) -> tuple[Parameters, Trace]:
        key = (config.model.model_dump_json(), shape, accumulated, micro_batches)
        if key not in self._traces:
            policy = planned_policy(self._model, plan_dtype(config, self._machine), config.model)
            seen = trace(
                policy, shape, device=self._machine.device, accumulated=accumulated, micro_batches=micro_batches
            )
            self._traces[key] = Parameters.of(policy), seen
        return self._traces[key]

    def _reference(self, config: Config, parameters: Parameters) -> tuple[int, int, int]:
        """(bytes on the device all the time, more during its pass, bytes in host memory)"""
        size = parameters.total * parameters.itemsize if config.loads_reference else 0
        ranks = self._machine.gpus
        if config.model.reference == "copy":
            return size, 0, 0
        if config.model.reference == "cpu":
            return 0, size * (self._machine.device == "cuda"), size
        live = min(size, GATHERED_REFERENCE * parameters.itemsize)
        return -(-size // ranks), live * (ranks > 1), 0

    def _generate(self, config: Config, resident: dict[str, int], parameters: Parameters) -> dict[str, int]:
        rollout, sharded = config.rollout, config.train.zero_stage == 3
        parts = resident | ({"fp32 masters": 0, "AdamW moments": 0} if rollout.offload_optimizer else {})
        if rollout.engine == "servers":
            return parts
        size = parameters.total * parameters.itemsize
        if self._machine.device == "cuda" and planned_engine(rollout.engine) == "vllm":
            weights = vllm_weight_bytes(config, parameters)
            room = int(rollout.gpu_memory * self._machine.memory)
            return parts | {
                "weights gathered for the sync": min(size, int(rollout.sync_gib * GIB)) * sharded,
                "vLLM weights": weights,
                "vLLM KV cache, activations": max(0, room - weights),
            }
        if sharded:  # a full copy generates
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


def _present(parts: dict[str, int]) -> dict[str, int]:
    return {part: size for part, size in parts.items() if size}
