"""The policy as a Hugging Face directory, which plain transformers loads."""

import shutil
from pathlib import Path

from safetensors import SafetensorError

from mssr.distributed import World
from mssr.errors import UserError
from mssr.policy.model import Policy


def save_model(policy: Policy, processors: tuple, folder: Path, world: World) -> Path:
    """Writes weights, config, tokenizer and image processor; the folder appears only when it is complete.

    processors: (tokenizer, image processor), each with `save_pretrained`.

    Raises:
        UserError: it could not be written (disk full, permission).
    """
    if world.is_main:
        partial = folder.with_name(f".partial_{folder.name}")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            _write(policy, processors, partial)
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


def _write(policy: Policy, processors: tuple, folder: Path) -> None:
    policy.model.save_pretrained(folder)
    for processor in processors:
        processor.save_pretrained(folder)
