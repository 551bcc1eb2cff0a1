"""The policy as a Hugging Face directory, which plain transformers loads; its adapter as one of peft's."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from mssr.distributed import World
from mssr.errors import UserError
from mssr.policy.lora import adapted_layers, own_name, write_adapter
from mssr.policy.model import Policy
from mssr.policy.weights import BUCKET_BYTES, gathered, named_weights, untied_names


def save_model(policy: Policy, processors: tuple, folder: Path, world: World) -> Path:
    """Writes weights, config, tokenizer and image processor; the folder appears only when it is complete.

    With LoRA the weights are merged, and the adapter alone is written beside the folder, as `adapter`.
    Called on all ranks (under ZeRO-3 it gathers the weights); rank 0 writes.

    processors: (tokenizer, image processor or None), each with `save_pretrained`.

    Raises:
        UserError: it could not be written (disk full, permission).
    """
    adapter = adapter_weights(policy)
    weights = _whole_weights(policy, world) if adapter or policy.partitioned else None
    problem = None
    if world.is_main:
        try:
            if adapter:
                write_folder(folder.with_name("adapter"), lambda partial: write_adapter(policy, adapter, partial))
            write_folder(folder, lambda partial: write_model(policy, weights, processors, partial))
        except UserError as error:
            problem = str(error)
    problem = world.gather(problem)[0]  # the others wait here
    if problem:
        raise UserError(problem)
    return folder


def write_model(policy: Policy, weights: dict[str, Tensor] | None, processors: tuple, folder: Path) -> None:
    """weights: by the names of the model without adapters; None: the model's own."""
    policy.model.save_pretrained(folder, state_dict=weights)
    for processor in processors:
        if processor is not None:
            processor.save_pretrained(folder)


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` with a folder beside this one, which takes its place, and that of what was there, when all is written.

    Raises:
        UserError: it could not be written (disk full, permission).
    """
    partial = folder.with_name(f".partial_{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        write(partial)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder}: could not be saved: {reason}; make room and run again (train: with --resume)"
        ) from None
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


@torch.no_grad()
def adapter_weights(policy: Policy) -> dict[str, Tensor]:
    """Every part of the adapters in host memory, whole, by its parameter's name; empty without LoRA. Collective."""
    if not adapted_layers(policy):
        return {}
    parts = {name: part for name, part in policy.model.named_parameters() if own_name(name) is None}
    with gathered(list(parts.values())):
        return {name: part.detach().cpu().clone() for name, part in parts.items()}


def _whole_weights(policy: Policy, world: World) -> dict[str, Tensor]:
    """State dict in rank 0's host memory; a tied weight under its first name alone, as it is saved. Elsewhere empty."""
    saved = untied_names(policy) if world.is_main else ()
    return {name: weight.cpu().clone() for name, weight in named_weights(policy, BUCKET_BYTES) if name in saved}
