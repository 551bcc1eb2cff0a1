"""Processor time that the host of a virtual machine took away (steal time), and the runs that this disturbed."""

from collections.abc import Callable

import psutil

SPOILT = 0.05  # share of a run's time, over all processors; the system counts in hundredths of a second
ATTEMPTS = 3


def stolen_seconds() -> float:
    """Return the seconds stolen since the machine started; 0 if the system does not count them."""
    return getattr(psutil.cpu_times(), "steal", 0.0)


def least_disturbed(run: Callable[[], float]) -> tuple[float, bool]:
    """Return the seconds that `run` returns, and whether steal time spoilt them. A spoilt run is repeated, up to ATTEMPTS
    runs, and the least spoilt one counts: two threads that wait for each other take twice as long if one is held up."""
    runs = []
    while len(runs) < ATTEMPTS:
        before = stolen_seconds()
        seconds = run()
        runs.append(((stolen_seconds() - before) / seconds, seconds))
        if runs[-1][0] <= SPOILT:
            break
    share, seconds = min(runs)
    return seconds, share > SPOILT
