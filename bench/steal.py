"""Processor time that the host of a virtual machine gave to others, and the runs that it spoilt."""

import os
from collections.abc import Callable
from pathlib import Path

STAT = Path("/proc/stat")
SPOILT = 0.05  # of a run's time, over all processors; the system counts in hundredths of a second
ATTEMPTS = 3


def stolen_seconds() -> float:
    """Return the seconds stolen since the machine started; 0 if the system does not tell."""
    fields = STAT.read_text().split(maxsplit=9) if STAT.exists() else ()
    return int(fields[8]) / os.sysconf("SC_CLK_TCK") if len(fields) > 8 else 0.0


def least_disturbed(run: Callable[[], float]) -> tuple[float, bool]:
    """Return the seconds that `run` returns, and whether the host spoilt them. A spoilt run is repeated, up to ATTEMPTS runs,
    and the least spoilt counts. Two threads that wait for each other take twice as long if one of them is held up."""
    runs = []
    while len(runs) < ATTEMPTS:
        before = stolen_seconds()
        seconds = run()
        runs.append(((stolen_seconds() - before) / seconds, seconds))
        if runs[-1][0] <= SPOILT:
            break
    share, seconds = min(runs)
    return seconds, share > SPOILT
