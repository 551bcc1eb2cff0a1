"""Runs a function in a process of its own, whose peak memory is that function's alone; for the examples that measure."""

import os
import resource
import threading
import time
from multiprocessing import get_context, parent_process


def in_own_process(function, argument):
    """Return function(argument), computed in a fork. Nothing else of torch may have run in this process."""
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(function, argument, sender))
    process.start()
    sender.close()  # so that recv fails if the process does
    found = receiver.recv()
    process.join()
    return found


def peak_mib() -> float:
    """Return the most memory that this process has had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts KiB


def _run(function, argument, sender):
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    sender.send(function(argument))


def _end_with_the_parent():
    while os.getppid() == parent_process().pid:
        time.sleep(1)
    os._exit(1)
