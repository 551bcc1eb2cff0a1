"""`run_dir/reward.log`: what reward functions print, up to a MiB, and tracebacks of those that failed, up to a second one.

All ranks and workers append to it. Run as a script, it appends its input: the end of a pipe, which workers print into. So
printing never waits for the trainer, and what is printed before the run has its folder is kept until then.
"""

import os
import sys
from contextlib import suppress
from pathlib import Path

LIMIT = 1 << 20  # bytes
FULL = b"\n[reward.log is full: what reward functions print from here on is not kept]\n"


def append(log: Path, text: bytes, most: int = LIMIT) -> None:
    """Append what fits of the text into a file of `most` bytes; nothing without a folder, or on a full disk."""
    with suppress(OSError), open(log, "ab", buffering=0, opener=_no_symlink) as file:
        size = os.fstat(file.fileno()).st_size
        filled = size < LIMIT <= size + len(text)
        file.write(text[: max(0, most - size)] + (FULL if filled else b""))


def _no_symlink(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)  # what a symlink names is somebody's


if __name__ == "__main__":
    target, kept = Path(sys.argv[1]), b""
    while printed := os.read(0, 1 << 16):
        kept = (kept + printed)[: LIMIT + 1]
        if target.parent.is_dir():
            append(target, kept)
            kept = b""
    append(target, kept)
