"""What `bench.step` and `bench.sync` will take: the memory that `mssr plan` predicts for their models."""

import torch

from mssr.config import validate_config
from mssr.observe.gpu import Gpu
from mssr.planning.memory import Machine, MemoryPlanner
from mssr.planning.trace import MicroBatchShape
from mssr.planning.zero import Parameters, trainer_state, zero_settings

from . import estimate, machine, models
from .memory import GIB
from .report import EAGER
from .step_case import SIZES, make_sequences, model_options, train_options
from .sync_case import run_config

UPDATE = ("scoring", "forward_backward", "optimizer")  # phases of an update, and of the log-probs before it
CONTEXT = int(1.5 * GIB)  # on CUDA
LAUNCHER = 3 * GIB // 5  # the process that starts a sync's ranks
RANK = 2 * GIB  # on a CPU: libraries, and vLLM's cache


def step_bytes(case: dict) -> int:
    """Return the peak of an update: on a CPU of its process; on CUDA without the logits of eager, which fails alone.

    case: of `step_case.measure`.
    """
    size, on_cuda = SIZES[case["size"]], case["device"] == "cuda"
    config = models.config(size.model, size.text)
    sequences = make_sequences(config, case["tokens"])
    responses = int(sequences.lengths.sum())
    grids = [prompt.image_grid_thw for prompt in sequences.prompts if prompt.image_grid_thw is not None]
    lengths = [len(prompt.token_ids) + int(length) for prompt, length in zip(sequences.prompts, sequences.lengths)]
    shape = MicroBatchShape(tuple(lengths), responses, tuple(tuple(grid) for each in grids for grid in each.tolist()))
    settings = validate_config({
        "run_dir": "unused", "data": {"train": "unused"}, "rollout": {"engine": "hf"},
        "model": model_options(case).model_dump(), "train": train_options(case).model_dump(),
    })  # fmt: skip
    gpu = Gpu("", "", machine.free_bytes("cuda") / GIB, 0, 0, 0) if on_cuda else None
    memory = MemoryPlanner(config, Machine(1, gpu)).predict(settings, shape, micro_batches=1)
    peak = max(memory.total(phase) for phase in UPDATE)
    if on_cuda:
        return peak
    logits = estimate.LOGIT[case["dtype"]] * responses * config.get_text_config().vocab_size
    return estimate.LIBRARIES + peak + (logits if case["head"] == EAGER else 0)


def sync_bytes(case: dict) -> int:
    """Return what trainer and vLLM hold between syncs: on a CPU all ranks, on CUDA one rank. case: of `sync_case.measure`."""
    dtype, on_cuda = getattr(torch, case["dtype"]), case["device"] == "cuda"
    parameters = Parameters.of(models.random_policy(models.config(case["size"]), dtype, torch.device("meta")))
    size = parameters.total * parameters.itemsize
    settings, held = run_config(case | {"folder": "unused"}), size
    if case["mode"] != "zero0":
        zero = zero_settings(settings, dtype)
        state = trainer_state(parameters, zero, case["ranks"], eager=on_cuda, micro_batches=1)
        held = state.weights + state.masters + state.moments
        held += min(size, int(settings.rollout.sync_gib * GIB)) if case["mode"] == "zero3" else 0
    if on_cuda:
        return CONTEXT + held + size
    written = 0 if case["mode"] == "zero0" else size
    return LAUNCHER + case["ranks"] * (RANK + held + size) + written
