"""`run_dir/reward.log`: what reward functions print, and tracebacks of those that failed. Its first MiB is kept.

All ranks and workers append to it. Run as a script, it appends its input: the end of a pipe, which workers print into. So
printing never waits for the trainer.
"""

import os
import sys
from pathlib import Path

LIMIT = 1 << 20  # bytes
FULL = b"\n[reward.log is full: what reward functions print from here on is not kept]\n"


def append(log: Path, text: bytes) -> None:
    """Append the text, or what fits of it. Nothing is kept before the run has its folder."""
    if not log.parent.is_dir():
        return
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        room = LIMIT - os.fstat(file).st_size
        if room > 0:
            os.write(file, text if len(text) < room else text[:room] + FULL)
    finally:
        os.close(file)


if __name__ == "__main__":
    while printed := os.read(0, 1 << 16):
        append(Path(sys.argv[1]), printed)
