"""Memory that DeepSpeed's ZeRO keeps on each rank, from its settings."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mssr.config import Config
from mssr.config.deepspeed_json import ZERO
from mssr.policy.deepspeed_settings import deepspeed_settings
from mssr.policy.model import Policy

if TYPE_CHECKING:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

FP32 = 4


def zero_settings(config: Config, dtype: torch.dtype) -> "DeepSpeedZeroConfig":
    """Return a run's settings with DeepSpeed's own defaults; sizes are in elements. dtype: of the weights."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # slow to import

    return DeepSpeedZeroConfig(**deepspeed_settings(config.train.optimizer, config.train, dtype)[ZERO])


def on_host(offload: Any) -> bool:
    """Whether `offload_optimizer` or `offload_param` moves its part to host memory."""
    return offload is not None and offload.device == "cpu"


@dataclass(frozen=True)
class Parameters:
    """total, trained: elements of the whole model. largest: elements of its largest tensor. itemsize: bytes per element."""

    total: int
    trained: int
    largest: int
    itemsize: int

    @classmethod
    def of(cls, policy: Policy) -> "Parameters":
        sizes = [(each.numel(), each.requires_grad) for each in policy.parameters()]
        return cls(
            total=sum(size for size, _ in sizes),
            trained=sum(size for size, trained in sizes if trained),
            largest=max(size for size, _ in sizes),
            itemsize=next(policy.parameters()).itemsize,
        )


@dataclass(frozen=True)
class TrainerState:
    """Bytes on one rank.

    weights, masters, moments: resident all the time.
    gradients: kept from one micro-batch to the next. reducing: buffers for gradients in a backward pass, beside
        activations. last_reduction: the same at its end, when no activations are left.
    stepping: gradients during the optimizer's step. gathered: full weights of layers while they compute.
    host: in host memory, by DeepSpeed's own offloading.
    """

    weights: int
    masters: int
    moments: int
    gradients: int
    reducing: int
    last_reduction: int
    stepping: int
    gathered: int
    host: int


def trainer_state(
    parameters: Parameters, zero: "DeepSpeedZeroConfig", ranks: int, *, eager: bool, micro_batches: int
) -> TrainerState:
    """Bytes of the trainer's state on one rank.

    eager: the device reserves a buffer's memory at once (CUDA), not as it is written to (CPU).
    """
    size, trained = parameters.itemsize, parameters.trained
    own = -(-trained // ranks) if zero.stage else trained
    weights = parameters.total * size
    masters = FP32 * own if zero.stage else 0  # also for float32 weights
    moments = 2 * FP32 * own
    gathered = host = 0
    mixed = size != FP32
    bucket = zero.reduce_bucket_size if eager else min(zero.reduce_bucket_size, trained)
    bucket *= size * (2 if zero.overlap_comm else 1)  # one bucket is reduced while the next fills
    if zero.stage == 0:
        # The micro-batch's trace includes these gradients. At its end, flat copies are summed over ranks.
        gradients = reducing = 0
        last_reduction = FP32 * (trained + min(trained, zero.reduce_bucket_size + parameters.largest))
        stepping = FP32 * trained
    elif zero.stage == 3:
        weights = -(-parameters.total // ranks) * size
        live = min(parameters.total, zero.max_live_parameters) if ranks > 1 or on_host(zero.offload_param) else 0
        gathered = min(parameters.total, live + zero.prefetch_bucket_size) * size if live else 0
        gradients = own * size
        reducing = last_reduction = bucket * (2 if ranks > 1 else 1)  # a copy of a bucket is split among the ranks
        stepping = own * size + min(own, zero.sub_group_size) * FP32 * mixed
    else:
        shared = own if zero.stage == 2 else trained
        # The sum over micro-batches; once the first bucket is full, also this micro-batch's share.
        gradients = shared * size if micro_batches > 1 else 0
        passes_early = trained > zero.reduce_bucket_size
        reducing = (bucket if eager or passes_early else 0) + (shared * size if passes_early else 0)
        last_reduction = bucket + shared * size
        # A flat copy, the list that it is made from, and a float32 copy.
        stepping = shared * size + own * size + own * FP32 * mixed
    if on_host(zero.offload_optimizer):
        host += masters + moments + own * FP32  # the host's AdamW also keeps float32 gradients
        if zero.stage < 3:
            host += gradients + own * size  # and the rounded weights
            gradients = 0
        masters = moments = stepping = 0
    if on_host(zero.offload_param):
        host += weights
        weights = 0
    return TrainerState(weights, masters, moments, gradients, reducing, last_reduction, stepping, gathered, host)
