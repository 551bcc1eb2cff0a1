"""Saves a figure as a PNG that says who drew it, so that it may be replaced, and no other file is."""

import os
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from mssr.errors import UserError

_KEY, _OURS = "Source", "mssr plot"  # text in the PNG


def refuse_other_file(out: Path) -> None:
    """Check that a picture may be written there.

    Raises:
        UserError: the name does not end in .png, or a file is there that is no picture of ours.
    """
    if out.suffix.lower() != ".png":
        raise UserError(f"{out}: name a .png file")
    if os.path.lexists(out) and not _is_ours(out):
        raise UserError(f"{out}: already there, and not drawn by `mssr plot`; name another file with --out")


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
