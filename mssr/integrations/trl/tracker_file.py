"""The value tracker in a checkpoint of TRL."""

from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME  # the file that TRL writes last
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mssr import torch_file
from mssr.errors import UserError

NAME = "value_tracker.pt"  # beside the optimizer state
KEYS = {"tracker", "moved"}


def save_tracker(state: dict[str, Any], checkpoint: Path) -> None:
    """Write the state whole or not at all. state: KEYS. checkpoint: folder, which need not exist yet."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    partial = checkpoint / f".partial_{NAME}"
    torch_file.write(partial, state)
    partial.rename(checkpoint / NAME)
    torch_file.flush_folder(checkpoint)


def load_tracker(checkpoint: Path) -> dict[str, Any]:
    """Return what `save_tracker` wrote.

    Raises:
        UserError: the file is missing or damaged; names the newest checkpoint that is whole.
    """
    try:
        return torch_file.read(checkpoint / NAME, KEYS)
    except torch_file.Damaged as damaged:
        whole = [folder for folder in _others(checkpoint) if _is_whole(folder)]
        way_out = f"resume from {whole[-1]}" if whole else "resume from a checkpoint of MSSRTrainer"
        raise UserError(f"{checkpoint / NAME}: {damaged}; {way_out}, or start a new run") from None


def _others(checkpoint: Path) -> list[Path]:
    """Return the other checkpoints of the run, by step."""
    steps = {
        int(step): folder
        for folder in checkpoint.absolute().parent.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (step := folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")).isdecimal()
        and folder.name != checkpoint.name
    }
    return [steps[step] for step in sorted(steps)]


def _is_whole(checkpoint: Path) -> bool:
    try:
        torch_file.read(checkpoint / NAME, KEYS)
    except torch_file.Damaged:
        return False
    return (checkpoint / TRAINER_STATE_NAME).is_file()
