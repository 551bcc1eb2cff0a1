"""A tracker whose library runs in a process of its own.

These libraries talk to servers, start threads and processes, print, change signal and exit handlers. Apart from the trainer,
a server that does not answer cannot stall a step, and whatever fails ends the tracker, not the run.
"""

import json
import os
import pickle
import queue
import select
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import mssr
from mssr.errors import UserError
from mssr.observe.trackers.base import Start
from mssr.observe.trackers.child import FINISH_S

START_S = 120.0  # imports from a cold disk, and a login
CLOSE_S = FINISH_S + 5.0
LOG = "output.log"


class Apart:
    """An `ExperimentTracker` in a child process. Its methods return at once; its failure is one line on stderr, once."""

    id = ""

    def __init__(self, name: str, start: Start) -> None:
        self._name, self._log = name, start.folder / LOG
        here = os.pathsep.join(filter(None, [str(Path(mssr.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "mssr.observe.trackers.child", name],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                env=os.environ | {"PYTHONPATH": here},
                start_new_session=True,  # the terminal's Ctrl-C is for the trainer
            )  # fmt: skip
        self._messages: queue.SimpleQueue[tuple | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._send, name=f"tracker {name}", daemon=True)
        with suppress(BrokenPipeError):  # it has ended; `wait_until_ready` says why
            self._write((start,))

    def wait_until_ready(self) -> None:
        """Raises:
        UserError: the tracker cannot be started.
        """
        answers = select.poll()  # not select(): a trainer with vLLM has more than 1024 open files
        answers.register(self._process.stdout, select.POLLIN)
        if not answers.poll(START_S * 1000):
            answer = {"error": f"no answer in {START_S:.0f} s"}
        else:
            answer = json.loads(self._process.stdout.readline() or b'{"error": "ended at its start"}')
        if "error" in answer:
            raise UserError(
                f"log.trackers {self._name}: {answer['error']}; fix it, or leave it out (docs/TRACKERS.md; its output: "
                f"{self._log})"
            )
        self.id, self.place = answer["id"], answer["place"]
        self._thread.start()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._put("scalars", step, values)

    def rollouts(self, step: int, table: dict[str, list]) -> None:
        self._put("rollouts", step, table)

    def curves(self, step: int, picture: Path) -> None:
        self._put("curves", step, picture)

    def close(self, ok: bool) -> None:
        self._put("close", ok)
        self._messages.put(None)

    def _put(self, *message: Any) -> None:
        if self._thread.is_alive():  # of a tracker that has failed they would fill memory
            self._messages.put(message)

    def wait_until_closed(self) -> None:
        """Wait, at most CLOSE_S, until the tracker has sent everything."""
        if self._thread.is_alive():
            self._thread.join(CLOSE_S)
        self._process.kill()
        if self._thread.is_alive():
            self._thread.join()

    def _send(self) -> None:
        """Pass on the messages, in a thread, until the last one or the end of the child; then say how it failed."""
        with suppress(BrokenPipeError), self._process.stdin:
            while message := self._messages.get():
                self._write(message)
        line = self._process.stdout.readline()
        if self._process.wait() == 0:
            return
        error = json.loads(line)["error"] if line else _how_it_ended(self._process.returncode)
        print(
            f"mssr: log.trackers {self._name}: {error}; what it does not have is in metrics.jsonl "
            f"(its output: {self._log})",
            file=sys.stderr, flush=True,
        )  # fmt: skip

    def _write(self, message: tuple) -> None:
        pickle.dump(message, self._process.stdin)
        self._process.stdin.flush()


def _how_it_ended(code: int) -> str:
    if code == -signal.SIGALRM:
        return f"not finished in {FINISH_S} s"
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
