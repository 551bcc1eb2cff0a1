"""Reference policy of the KL term: the frozen initial policy, or the current policy with blank images.

With LoRA the initial policy is the current one without its adapters and needs no memory of its own. Otherwise
`model.reference` says where its weights are: copy, on every rank's device; sharded, over all ranks by ZeRO-3, each layer
gathered for its computation; cpu, in host memory, moved to the device for each pass.
"""

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from mssr.batch import Prompt, Sequences
from mssr.config.algorithm_keys import AlgorithmConfig
from mssr.config.schema import ModelConfig
from mssr.distributed import World
from mssr.policy.engine import PolicyEngine
from mssr.policy.loading import load_frozen_policy, load_policy, without_training
from mssr.policy.lora import without_adapters
from mssr.policy.model import Policy
from mssr.policy.sharding import PERSISTENT_NUMEL, load_partitioned_policy


class Reference(Protocol):
    def score(self, engine: PolicyEngine, batch: Sequences) -> Tensor:
        """Return the log-prob of each response token, [B, R] float32. Collective, as `engine.score`."""
        ...


def make_reference(algorithm: AlgorithmConfig, options: ModelConfig, engine: PolicyEngine) -> Reference | None:
    """Load what the KL term needs, in the dtype of the engine's policy; return None for a loss without a KL term.

    Raises:
        UserError: as `load_policy`.
    """
    if not algorithm.kl_coef:
        return None
    return BlankImageReference() if algorithm.kl_to == "text_only" else frozen_start(options, engine)


def frozen_start(options: ModelConfig, engine: PolicyEngine) -> Reference:
    """Load the initial policy, placed as `options.reference` says.

    Raises:
        UserError: as `load_policy`.
    """
    if options.lora is not None:
        return AdapterlessReference()
    world, dtype = engine.world, next(engine.policy.parameters()).dtype
    if options.reference == "sharded":
        return ShardedReference(options, dtype, world)
    if options.reference == "cpu":
        policy = load_policy(options.path, dtype, without_training(options), world.device)
        return HostReference(policy.requires_grad_(False).eval(), world.device)
    return FrozenReference(load_frozen_policy(options.path, dtype, world.device, options))


class FrozenReference:
    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def score(self, engine: PolicyEngine, batch: Sequences) -> Tensor:
        return engine.score(batch, self._policy)


class ShardedReference(FrozenReference):
    """Each rank holds its shard, and a few layers while they compute."""

    def __init__(self, options: ModelConfig, dtype: torch.dtype, world: World) -> None:
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": dtype == torch.bfloat16},
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": PERSISTENT_NUMEL},
            "steps_per_print": None,
        }
        policy = load_partitioned_policy(options.path, dtype, world, settings, without_training(options))
        super().__init__(policy.requires_grad_(False).eval())
        import deepspeed  # reads DS_ACCELERATOR when imported, which start_world sets

        # Without an optimizer DeepSpeed only installs ZeRO-3's hooks, which gather and release each module's parameters.
        self._engine, *_ = deepspeed.initialize(model=policy, config=settings)


class HostReference(FrozenReference):
    """Uses device memory only during a pass, at the price of one copy to the device per pass."""

    def __init__(self, policy: Policy, device: torch.device) -> None:
        super().__init__(policy)
        self._device = device
        self._tensors = [*policy.parameters(), *policy.buffers()]
        self._host = [tensor.data for tensor in self._tensors]
        if device.type == "cuda":
            self._host = pinned(self._host)
        self._release()

    def score(self, engine: PolicyEngine, batch: Sequences) -> Tensor:
        for tensor, host in zip(self._tensors, self._host):
            tensor.data = host.to(self._device, non_blocking=True)
        try:
            return super().score(engine, batch)
        finally:
            self._release()

    def _release(self) -> None:
        for tensor, host in zip(self._tensors, self._host):
            tensor.data = host


def pinned(tensors: list[Tensor]) -> list[Tensor]:
    """Return copies in page-locked host memory, which copy to a GPU several times faster.

    All share one block: torch rounds each pinned allocation up to a power of two, which would waste nearly half as much
    again.
    """
    sizes = [-(-tensor.nbytes // 64) * 64 for tensor in tensors]
    block = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=True)
    parts = block.split(sizes)
    copies = [part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape) for part, tensor in zip(parts, tensors)]
    for copy, tensor in zip(copies, tensors):
        copy.copy_(tensor)
    return copies


class AdapterlessReference:
    def score(self, engine: PolicyEngine, batch: Sequences) -> Tensor:
        with without_adapters(engine.policy):
            return engine.score(batch)


class BlankImageReference:
    """The current policy with blank images: the text-only KL of arXiv 2512.18215, a comparison to entropy shaping.

    (Its authors' code computes this KL but never adds it to the loss.)

    A blank image has the processor's mean colour (pixels 0 after normalisation) and the same number of tokens, so every
    token keeps its position. A prompt without images has a KL of 0 until the first update.
    """

    def score(self, engine: PolicyEngine, batch: Sequences) -> Tensor:
        return engine.score(replace(batch, prompts=tuple(_blank(prompt) for prompt in batch.prompts)))


def _blank(prompt: Prompt) -> Prompt:
    if prompt.pixel_values is None:
        return prompt
    return replace(prompt, pixel_values=torch.zeros_like(prompt.pixel_values))
