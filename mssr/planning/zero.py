"""Memory that DeepSpeed's ZeRO keeps on each rank, from its settings."""

from dataclasses import dataclass, replace
from typing import Any

FP32 = 4


@dataclass(frozen=True)
class Zero:
    """DeepSpeed's settings that affect memory; sizes are in elements, with DeepSpeed's own defaults.

    double_buckets: overlap_comm reduces one bucket while the next fills.
    """

    stage: int
    offload_optimizer: bool = False
    offload_param: bool = False
    double_buckets: bool = False
    reduce_bucket: int = 500_000_000
    prefetch_bucket: int = 50_000_000
    max_live: int = 1_000_000_000
    sub_group: int = 1_000_000_000

    @classmethod
    def of(cls, settings: dict[str, Any]) -> "Zero":
        """Read DeepSpeed's settings."""
        zero = settings["zero_optimization"]
        names = {
            "reduce_bucket": "reduce_bucket_size",
            "prefetch_bucket": "stage3_prefetch_bucket_size",
            "max_live": "stage3_max_live_parameters",
            "sub_group": "sub_group_size",
        }
        sizes = {own: int(zero[name]) for own, name in names.items() if name in zero}
        return cls(
            zero["stage"],
            offload_optimizer=(zero.get("offload_optimizer") or {}).get("device") == "cpu",
            offload_param=(zero.get("offload_param") or {}).get("device") == "cpu",
            double_buckets=bool(zero.get("overlap_comm")),
            **sizes,
        )


@dataclass(frozen=True)
class Parameters:
    """total, trained: elements of the whole model. largest: elements of its largest tensor. itemsize: bytes per element."""

    total: int
    trained: int
    largest: int
    itemsize: int

    @property
    def mixed(self) -> bool:
        return self.itemsize != FP32


@dataclass(frozen=True)
class TrainerState:
    """Bytes on one rank.

    weights, masters, moments: resident all the time.
    gradients: kept from one micro-batch to the next. reducing: buffers for gradients in a backward pass, beside
        activations. last_reduction: the same at its end, when no activations are left.
    gathered: full weights of layers while they compute. stepping: gradients during the optimizer's step.
    """

    weights: int
    masters: int
    moments: int
    gradients: int
    reducing: int
    last_reduction: int
    gathered: int
    stepping: int


def trainer_state(parameters: Parameters, zero: Zero, ranks: int, *, eager: bool, micro_batches: int) -> TrainerState:
    """Bytes of the trainer's state on one rank.

    eager: the device reserves a buffer's memory at once (CUDA), not as it is written to (CPU).
    """
    size, trained = parameters.itemsize, parameters.trained
    own = -(-trained // ranks)
    state = {
        "weights": parameters.total * size,
        "masters": FP32 * own if zero.stage else 0,  # also for float32 weights
        "moments": 2 * FP32 * (own if zero.stage else trained),
        "gathered": 0,
    }
    bucket = zero.reduce_bucket if eager else min(zero.reduce_bucket, trained)
    bucket *= size * (2 if zero.double_buckets else 1)
    if zero.stage == 0:
        # The micro-batch's trace includes these gradients. At its end, flat copies are summed over ranks.
        flat = min(trained, zero.reduce_bucket + parameters.largest) * FP32
        return TrainerState(
            **state, gradients=0, reducing=0, last_reduction=trained * FP32 + flat, stepping=trained * FP32
        )
    if zero.stage == 3:
        if parameters.total:
            state["weights"] = -(-parameters.total // ranks) * size
        live = min(parameters.total, zero.max_live) if ranks > 1 or zero.offload_param else 0
        state["gathered"] = min(parameters.total, live + zero.prefetch_bucket) * size if live else 0
        # A copy of a bucket is split among the ranks.
        return TrainerState(
            **state,
            gradients=own * size,
            reducing=2 * bucket if ranks > 1 else bucket,
            last_reduction=2 * bucket if ranks > 1 else bucket,
            stepping=own * size + min(own, zero.sub_group) * FP32 * parameters.mixed,
        )
    shared = own if zero.stage == 2 else trained
    # The sum over micro-batches; once the first bucket is full, also this micro-batch's share.
    kept = shared * size if micro_batches > 1 else 0
    passes_early = trained > zero.reduce_bucket
    return TrainerState(
        **state,
        gradients=kept,
        reducing=(bucket if eager or passes_early else 0) + (shared * size if passes_early else 0),
        last_reduction=bucket + shared * size,
        # A flat copy, the list that it is made from, and a float32 copy.
        stepping=shared * size + own * size + own * FP32 * parameters.mixed,
    )


def offloaded(state: TrainerState, parameters: Parameters, zero: Zero, ranks: int) -> tuple[TrainerState, int]:
    """(state that stays on the device, bytes in this rank's host memory) with DeepSpeed's own offloading."""
    own, host = -(-parameters.trained // ranks), 0
    values = {}
    if zero.offload_optimizer:
        # The host's AdamW also keeps float32 gradients, and up to ZeRO-2 the rounded weights.
        rounded = own * parameters.itemsize if zero.stage < 3 else 0
        host += state.masters + state.moments + own * FP32 + rounded
        values |= {"masters": 0, "moments": 0, "stepping": 0}
        if zero.stage < 3:
            host += state.gradients
            values["gradients"] = 0
    if zero.offload_param:
        host += state.weights
        values["weights"] = 0
    return replace(state, **values), host
