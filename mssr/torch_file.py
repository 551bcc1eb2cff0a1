"""Files of `torch.save` that survive a crash, and what is wrong with one that did not come from it whole."""

import os
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch


class Damaged(Exception):
    """What is wrong with a file."""


def read(file: Path, keys: set[str], *, mmap: bool = False) -> dict[str, Any]:
    """Return the dict in a file, which has these keys.

    Raises:
        Damaged: it is missing, cannot be read, or is not such a file.
    """
    try:
        content = torch.load(file, weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise Damaged("missing") from None
    except OSError as error:
        raise Damaged(f"cannot be read ({error.strerror or error})") from None
    except (EOFError, RuntimeError, ValueError, UnpicklingError, LookupError, TypeError, AttributeError):
        # empty, cut, overwritten: a byte changed inside the pickle may raise any of them
        raise Damaged(f"damaged ({file.stat().st_size} bytes)") from None
    if not isinstance(content, dict) or not keys <= content.keys():
        raise Damaged("damaged, it is no part of a checkpoint")
    return content


def write(file: Path, value: Any) -> None:
    """Write a value, or bytes as they are, and flush it to disk; `flush_folder` makes its name last too."""
    with open(file, "wb") as opened:
        opened.write(value) if isinstance(value, bytes) else torch.save(value, opened)
        opened.flush()
        os.fsync(opened.fileno())


def flush_folder(folder: Path) -> None:
    """Flush the names in a folder to disk: of new files, and of renamed ones."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
