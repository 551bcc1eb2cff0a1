"""What the KL term pulls the policy to: the frozen start of it, or what it says itself without seeing the images.

Where the start's weights are between the passes that need them: with LoRA nowhere, it is the policy without its adapters.
Otherwise `model.reference` says it: copy, whole on every rank's device; sharded, a share on every rank, gathered layer by
layer in a pass (ZeRO-3); cpu, whole in host memory, and on the device for the length of a pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from mssr.batch import Prompt, Sequences
from mssr.config import AlgorithmConfig, ModelConfig
from mssr.distributed import World
from mssr.policy.engine import PolicyEngine
from mssr.policy.loading import load_frozen_policy, load_policy, without_training
from mssr.policy.lora import without_adapters
from mssr.policy.model import Policy
from mssr.policy.zero3 import PERSISTENT_NUMEL, load_partitioned_policy


class Reference(Protocol):
    def score(self, engine: PolicyEngine, batch: Sequences) -> Tensor:
        """[B, R] float32: log-prob of each response token. Called on all ranks, as `engine.score`."""
        ...


def make_reference(algorithm: AlgorithmConfig, options: ModelConfig, engine: PolicyEngine) -> Reference | None:
    """Loads what the KL term needs, in the dtype of the engine's policy; None where the loss has no such term.

    Raises:
        UserError: as `load_policy`.
    """
    if not algorithm.kl_coef:
        return None
    return TextOnlyReference() if algorithm.kl_to == "text_only" else frozen_start(options, engine)


def frozen_start(options: ModelConfig, engine: PolicyEngine) -> Reference:
    """The policy as it was before training, where `options.reference` puts it.

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
    return CopyReference(load_frozen_policy(options.path, dtype, world.device, options))


class CopyReference:
    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def score(self, engine: PolicyEngine, batch: Sequences) -> Tensor:
        return engine.score(batch, self._policy)


class ShardedReference:
    """Every pass gathers every layer from all ranks: a rank holds its share, and a few layers while they compute."""

    def __init__(self, options: ModelConfig, dtype: torch.dtype, world: World) -> None:
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": dtype == torch.bfloat16},
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": PERSISTENT_NUMEL},
            "steps_per_print": None,
        }
        self._policy = load_partitioned_policy(options.path, dtype, world, settings, without_training(options))
        self._policy.requires_grad_(False).eval()
        import deepspeed  # reads DS_ACCELERATOR when imported, which start_world sets

        # Without an optimizer it is ZeRO-3's gathering and letting go, in hooks of the policy's own modules.
        self._engine, *_ = deepspeed.initialize(model=self._policy, config=settings)

    def score(self, engine: PolicyEngine, batch: Sequences) -> Tensor:
        return engine.score(batch, self._policy)


class HostReference:
    """No device memory but in a pass; the price is the copy to the device, once a pass."""

    def __init__(self, policy: Policy, device: torch.device) -> None:
        self._policy, self._device = policy, device
        self._tensors = [*policy.parameters(), *policy.buffers()]
        self._host = [tensor.data for tensor in self._tensors]
        if device.type == "cuda":
            self._host = pinned(self._host)
        self._leave()

    def score(self, engine: PolicyEngine, batch: Sequences) -> Tensor:
        with self._on_device():
            return engine.score(batch, self._policy)

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        for tensor, host in zip(self._tensors, self._host):
            tensor.data = host.to(self._device, non_blocking=True)
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        """Nothing is written back: nobody changed it."""
        for tensor, host in zip(self._tensors, self._host):
            tensor.data = host


def pinned(tensors: list[Tensor]) -> list[Tensor]:
    """Copies in page-locked host memory, for several times the speed to a GPU. All in one block: torch rounds each up to a
    power of two, which for tensors of their own would be nearly half of it again."""
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


class TextOnlyReference:
    """The policy as it is now, its images blank: the text-only KL that arXiv 2512.18215 compares shaping with (and that its
    authors' code computes but never adds to the loss).

    A blank image is the processor's mean colour (pixels 0 after normalisation) in the same number of tokens, so that every
    token keeps its position. A prompt without images has a KL of 0 until the first update.
    """

    def score(self, engine: PolicyEngine, batch: Sequences) -> Tensor:
        return engine.score(replace(batch, prompts=tuple(_blank(prompt) for prompt in batch.prompts)))


def _blank(prompt: Prompt) -> Prompt:
    if prompt.pixel_values is None:
        return prompt
    return replace(prompt, pixel_values=torch.zeros_like(prompt.pixel_values))
