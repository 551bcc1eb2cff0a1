"""Device utilisation of a step: model FLOPs and their share of the peak, tokens, padding."""

from dataclasses import dataclass

import torch

from mssr.batch import Sequences
from mssr.distributed import World
from mssr.observe.flops import Flops, policy_flops
from mssr.observe.gpu import known_gpu
from mssr.policy.engine import UpdateStats
from mssr.policy.model import Policy
from mssr.stopwatch import Stopwatch

TERA = 1e12
SCORING_PHASES = ("drift", "old_logp", "reference")


@dataclass(frozen=True)
class Work:
    """Work of this rank in a step.

    tokens: prompt and response tokens of its rows. slots: token positions that attention computed, padding included
        (`PackedLayout.slots` over the update's micro-batches).
    flops: of one pass over its rows. checkpointing: the forward pass ran twice.
    """

    tokens: int
    slots: int
    flops: Flops
    checkpointing: bool = False


def work_of_step(policy: Policy, batch: Sequences, updates: list[UpdateStats]) -> Work:
    responses = batch.lengths.tolist()
    lengths = [len(prompt.token_ids) + response for prompt, response in zip(batch.prompts, responses)]
    images = [prompt.image_grid_thw.tolist() for prompt in batch.prompts if prompt.image_grid_thw is not None]
    return Work(
        tokens=sum(lengths),
        slots=sum(update.slots for update in updates),
        flops=policy_flops(policy, lengths, sum(responses), [grid for grids in images for grid in grids]),
        checkpointing=policy.model.is_gradient_checkpointing,
    )


def peak_tflops(device: torch.device, setting: float | None) -> float | None:
    """TFLOP/s of one device: log.peak_tflops, or the known GPU's; None for other devices."""
    if setting is not None or device.type != "cuda":
        return setting
    gpu = known_gpu(torch.cuda.get_device_name(device))
    return gpu.tflops if gpu else None


def utilisation(work: Work, clock: Stopwatch, world: World, peak: float | None) -> dict[str, float]:
    """Metrics of a step, means over the devices; a collective. peak: TFLOP/s of one device; None: no MFU.

    perf/tokens_per_second_per_gpu: over the whole step. perf/padding: padded slots per token.
    perf/update_tflops, perf/mfu: model FLOPs of forward and backward passes over the time of the phase forward_backward.
    perf/hardware_tflops: the same, including recomputation by gradient checkpointing.
    perf/step_tflops, perf/step_mfu: these FLOPs and those of scoring passes, over the time of the whole step, which
        includes sampling.
    """
    flops = work.flops
    training = flops.forward + flops.backward
    hardware = training + flops.recomputed * work.checkpointing
    scored = flops.forward * sum(phase in clock.seconds for phase in SCORING_PHASES)
    sums = torch.tensor([work.tokens, work.slots, training, hardware, scored], dtype=torch.float64)
    tokens, slots, training, hardware, scored = world.sum(sums).tolist()
    step, update = clock.total, clock.seconds["forward_backward"]
    per_device = TERA * world.size
    metrics = {
        "perf/tokens_per_second_per_gpu": tokens / world.size / step,
        "perf/padding": slots / max(tokens, 1.0) - 1,
        "perf/update_tflops": training / per_device / update,
        "perf/hardware_tflops": hardware / per_device / update,
        "perf/step_tflops": (training + scored) / per_device / step,
    }
    if peak is not None:
        metrics |= {
            "perf/mfu": metrics["perf/update_tflops"] / peak,
            "perf/step_mfu": metrics["perf/step_tflops"] / peak,
        }
    return metrics
