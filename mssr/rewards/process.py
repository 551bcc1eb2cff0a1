"""One worker process, as the pool sees it."""

import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from typing import Any

from mssr.guard import Guarded
from mssr.rewards import worker
from mssr.rewards.channel import Channel
from mssr.rewards.pulse import Pulse

# The worker finds modules where this process finds them: also what a notebook has added.
_COMMAND = (
    "import sys; sys.path[:] = sys.argv[4:]; from mssr.rewards.worker import main; main(*map(int, sys.argv[1:4]))"
)
# Pure Python integers raise an exception where GMP aborts the process.
_ENVIRONMENT = {"SYMPY_GROUND_TYPES": "python", "MPMATH_NOGMPY": "1"}
_END_S = 10.0


class Process:
    """Starts at once and does not wait. `ready` is what it says when the function is imported: None until then.

    jobs: those that it was given and has not answered, by number. alone: it must not get another one beside them.
    begun: when it was started. given: when it got its last job. retires: it says that it ends. hung_at: after its end,
    where it was at `dump`.
    """

    def __init__(self, start: worker.Start, output: int) -> None:
        """output: descriptor for what the function prints."""
        ours, theirs = socket.socketpair()
        self._dump = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  closed in `ended`
        with theirs, tempfile.TemporaryFile() as pulse:
            pulse.truncate(Pulse.SIZE)
            self.pulse = Pulse(pulse.fileno())
            passed = (theirs.fileno(), pulse.fileno(), self._dump.fileno())
            command = [sys.executable, "-P", "-u", "-c", _COMMAND, *map(str, passed), *sys.path]
            self._guarded = Guarded(
                command, pass_fds=passed, grace_s=0, env=os.environ | _ENVIRONMENT,
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip
        self.channel = Channel(ours)
        self.begun = self.given = time.monotonic()
        self.ready: dict[str, Any] | None = None
        self.jobs: dict[int, Any] = {}
        self.alone = self.retires = False
        self.hung_at = ""
        self._dumped: int | None = None
        self.channel.send(pickle.dumps(start))

    def dump(self, job: int) -> None:
        """Let it write where it is, for `hung_at` after its end."""
        if self._dumped != job:
            self._dumped = job
            self._dump.seek(0)  # the worker's position, too
            self._dump.truncate()
            with suppress(ProcessLookupError):
                os.kill(self.ready["pid"], signal.SIGUSR1)

    def kill(self) -> None:
        """Let it end, with what it has started; `ended` waits for that."""
        self._guarded.kill()

    def ended(self) -> str:
        """Wait for its end, and return what that was."""
        self.channel.end.close()
        try:
            code = self._guarded.wait(_END_S)
        except subprocess.TimeoutExpired:  # a driver does not let it go
            return "it cannot be killed"
        finally:
            self.hung_at = _stack(os.pread(self._dump.fileno(), 8_000, 0).decode(errors="replace"))
            self._dump.close()
        return signal.Signals(-code).name if code < 0 else f"exit status {code}"


def _stack(dump: str) -> str:
    """Return the function's part of what faulthandler wrote."""
    frames = [line for line in dump.splitlines()[1:] if worker.__file__ not in line and "<string>" not in line]
    return "\n".join(["It was here, the innermost call first:", *frames]) if frames else ""
