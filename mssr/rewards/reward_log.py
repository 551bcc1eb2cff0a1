"""`run_dir/reward.log`: what reward functions print, up to a MiB, and tracebacks of those that failed, up to a second one.

All ranks and workers append to it, once the run has its folder and has made the file. Run as a script, it appends its input:
the end of a pipe, which workers print into. So printing never waits for the trainer; what is printed before is kept for it.
"""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

LIMIT = 1 << 20  # bytes
FULL = b"\n[reward.log is full: what reward functions print from here on is not kept]\n"


def append(log: Path, text: bytes, most: int = LIMIT) -> None:
    """Append what fits of the text into a file of `most` bytes; nothing if there is no file, or on a full disk."""
    with suppress(OSError), open(log, "ab", buffering=0, opener=_existing) as file:
        size = os.fstat(file.fileno()).st_size
        filled = size < LIMIT <= size + len(text)
        file.write(text[: max(0, most - size)] + (FULL if filled else b""))


def sink(log: Path | None) -> tuple[int, subprocess.Popen | None]:
    """Return a descriptor for what the workers print, and the process that appends it to the log."""
    if log is None:
        return os.open(os.devnull, os.O_WRONLY), None
    reader, writer = os.pipe()
    command = [sys.executable, "-I", "-S", __file__, str(log)]
    printer = subprocess.Popen(command, stdin=reader, stdout=subprocess.DEVNULL, start_new_session=True)
    os.close(reader)
    return writer, printer


def _existing(path: str, flags: int) -> int:
    """Open a file that is there, but not what a symlink names, which is somebody's."""
    return os.open(path, flags & ~os.O_CREAT | os.O_NOFOLLOW)


if __name__ == "__main__":
    target, kept = Path(sys.argv[1]), b""
    while printed := os.read(0, 1 << 16):
        kept = (kept + printed)[: LIMIT + 1]
        if target.exists():
            append(target, kept)
            kept = b""
    append(target, kept)
