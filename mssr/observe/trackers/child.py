"""Runs one tracker in a process of its own, `python -m mssr.observe.trackers.child NAME`, for `mssr.observe.trackers.apart`.

It gets pickled messages on its standard input: the `Start`, then a method of the tracker and its arguments each; the end of
the input without a `close` means that the trainer has died. It answers in JSON lines: the tracker's id and place, or an
error, with which it ends. All that the library prints goes to standard error.
"""

import json
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from importlib import import_module

from mssr.errors import shortened
from mssr.observe.trackers.base import ExperimentTracker, Start

FINISH_S = 60  # for the tracker's end, once the trainer is at its own


def main(name: str) -> int:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    messages: queue.SimpleQueue[tuple] = queue.SimpleQueue()
    threading.Thread(target=_read, args=[messages], daemon=True).start()
    try:
        _serve(name, messages, answers)
    except BaseException as error:  # a library may end the process; of its own process that is all right
        traceback.print_exc()
        print(json.dumps({"error": f"{type(error).__name__}: {shortened(error, 300)}"}), file=answers, flush=True)
        signal.alarm(FINISH_S)
        return 1
    return 0


def _serve(name: str, messages: queue.SimpleQueue, answers) -> None:
    (start,) = messages.get()
    tracker = _open(name, start)
    print(json.dumps({"id": tracker.id, "place": tracker.place}), file=answers, flush=True)
    method = ""
    while method != "close":
        method, *arguments = messages.get()
        getattr(tracker, method)(*arguments)


def _open(name: str, start: Start) -> ExperimentTracker:
    return import_module(f"mssr.observe.trackers.{name}").Tracker(start)


def _read(messages: queue.SimpleQueue) -> None:
    """Runs in a thread, so that a library that hangs neither stalls the trainer nor outlives it by more than FINISH_S."""
    trainer = os.fdopen(os.dup(0), "rb")  # the interpreter would wait for sys.stdin at its end
    try:
        while True:
            messages.put(pickle.load(trainer))
    except (EOFError, pickle.UnpicklingError):  # the trainer may die within a message
        messages.put(("close", False))
        signal.alarm(FINISH_S)  # ends the process, also in an exit handler


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
