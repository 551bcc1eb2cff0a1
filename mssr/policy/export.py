"""The policy as a Hugging Face directory, which plain transformers loads."""

import shutil
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from mssr.distributed import World
from mssr.errors import UserError
from mssr.policy.model import Policy
from mssr.policy.weights import BUCKET_BYTES, named_weights


def save_model(policy: Policy, processors: tuple, folder: Path, world: World) -> Path:
    """Writes weights, config, tokenizer and image processor; the folder appears only when it is complete.

    Called on all ranks (under ZeRO-3 it gathers the weights); rank 0 writes.

    processors: (tokenizer, image processor), each with `save_pretrained`.

    Raises:
        UserError: it could not be written (disk full, permission).
    """
    weights = _gathered_weights(policy, world) if policy.partitioned else None
    if world.is_main:
        partial = folder.with_name(f".partial_{folder.name}")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            _write(policy, weights, processors, partial)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{folder}: could not be saved: {reason}; make room and run again (train: with --resume)"
            ) from None
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    world.barrier()
    return folder


def _gathered_weights(policy: Policy, world: World) -> dict[str, Tensor]:
    """State dict in rank 0's host memory; a tied weight under its first name alone, as it is saved. Elsewhere empty."""
    saved = {name for name, _ in policy.model.named_parameters()} if world.is_main else ()
    return {name: weight.cpu().clone() for name, weight in named_weights(policy, BUCKET_BYTES) if name in saved}


def _write(policy: Policy, weights: dict[str, Tensor] | None, processors: tuple, folder: Path) -> None:
    policy.model.save_pretrained(folder, state_dict=weights)
    for processor in processors:
        processor.save_pretrained(folder)
