"""Saves a figure as a PNG that says who drew it, so that it may be replaced, and no other file is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from mssr.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # a run checks its folder without it

_KEY, _OURS = "Source", "mssr plot"  # text in the PNG


def refuse_other_file(out: Path, remedy: str = "name another file with --out") -> None:
    """Check that a picture may be written there. remedy: last part of the error.

    Raises:
        UserError: the name does not end in .png, or a file is there that is no picture of ours.
    """
    if out.suffix.lower() != ".png":
        raise UserError(f"{out}: name a .png file")
    if os.path.lexists(out) and not _is_ours(out):
        raise UserError(f"{out}: already there, and not drawn by `mssr plot`; {remedy}")


def save_picture(figure: Figure, out: Path, dpi: int) -> Path:
    """Write the PNG, whole or not at all; return its path."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".partial_{os.getpid()}_{out.name}")
    try:
        figure.savefig(partial, dpi=dpi, format="png", metadata={_KEY: _OURS})
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return out


def _is_ours(file: Path) -> bool:
    try:
        with Image.open(file) as image:
            return not file.is_symlink() and image.format == "PNG" and image.info.get(_KEY) == _OURS
    except OSError:
        return False
