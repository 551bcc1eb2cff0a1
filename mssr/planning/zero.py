"""What DeepSpeed's ZeRO keeps on each rank, from its settings."""

from dataclasses import dataclass
from typing import Any

FP32 = 4


@dataclass(frozen=True)
class Zero:
    """DeepSpeed's settings that decide about memory; sizes are in elements, with DeepSpeed's own defaults.

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
        """settings: DeepSpeed's, whole."""
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
    """total, trained: elements of the model, over all ranks. largest: of its largest tensor. itemsize: bytes of one."""

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

    weights, masters, moments: there all the time.
    gradients: kept from one micro-batch to the next. reducing: buffers that gradients pass through in a backward pass,
        while activations are there. last_reduction: the same at its end, where no activation is left.
    gathered: weights of layers that are whole while they compute. stepping: gradients as the optimizer's step has them.
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
    """eager: the device reserves a buffer's memory whole when it is made (CUDA), not as it is written to (the CPU)."""
    size, trained = parameters.itemsize, parameters.trained
    own = -(-trained // ranks)
    state = {
        "weights": parameters.total * size,
        "masters": FP32 * own if zero.stage else 0,  # of float32 weights too
        "moments": 2 * FP32 * (own if zero.stage else trained),
        "gathered": 0,
    }
    bucket = zero.reduce_bucket if eager else min(zero.reduce_bucket, trained)
    bucket *= size * (2 if zero.double_buckets else 1)
    if zero.stage == 0:
        # The micro-batch's trace has these gradients. At its end they are summed over ranks in flat copies.
        flat = min(trained, zero.reduce_bucket + parameters.largest) * FP32
        return TrainerState(
            **state, gradients=0, reducing=0, last_reduction=trained * FP32 + flat, stepping=trained * FP32
        )
    if zero.stage == 3:
        if parameters.total:
            state["weights"] = -(-parameters.total // ranks) * size
        live = min(parameters.total, zero.max_live) if ranks > 1 or zero.offload_param else 0
        state["gathered"] = min(parameters.total, live + zero.prefetch_bucket) * size if live else 0
        # A bucket is cut for the ranks in a copy of it.
        return TrainerState(
            **state,
            gradients=own * size,
            reducing=2 * bucket if ranks > 1 else bucket,
            last_reduction=2 * bucket if ranks > 1 else bucket,
            stepping=own * size + min(own, zero.sub_group) * FP32 * parameters.mixed,
        )
    shared = own if zero.stage == 2 else trained
    # The sum over micro-batches, and beside it this micro-batch's part once the first bucket is full.
    kept = shared * size if micro_batches > 1 else 0
    passes_early = trained > zero.reduce_bucket
    return TrainerState(
        **state,
        gradients=kept,
        reducing=(bucket if eager or passes_early else 0) + (shared * size if passes_early else 0),
        last_reduction=bucket + shared * size,
        # Flat, beside the list that it is made of, and in float32.
        stepping=shared * size + own * size + own * FP32 * parameters.mixed,
    )


def offloaded(state: TrainerState, parameters: Parameters, zero: Zero, ranks: int) -> tuple[TrainerState, int]:
    """(what stays on the device, bytes in this rank's host memory) with DeepSpeed's own offloading."""
    own, host = -(-parameters.trained // ranks), 0
    values = dict(state.__dict__)
    if zero.offload_optimizer:
        # The float32 gradients, of which the host's AdamW makes its step, too; up to ZeRO-2 also the rounded weights.
        rounded = own * parameters.itemsize if zero.stage < 3 else 0
        host += state.masters + state.moments + own * FP32 + rounded
        values |= {"masters": 0, "moments": 0, "stepping": 0}
        if zero.stage < 3:
            host += state.gradients
            values["gradients"] = 0
    if zero.offload_param:
        host += state.weights
        values["weights"] = 0
    return TrainerState(**values), host
