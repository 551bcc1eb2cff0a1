"""Ctrl-C; SIGTERM and SIGUSR1, which schedulers send some time before they kill a job; SIGHUP of a closed terminal."""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from mssr.distributed import World
from mssr.errors import Interrupted, UserError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
REPEATED_S = 10.0
AFTER_CTRL_C_S = 0.3
RANKS_END_S = 5.0


class Interruptions:
    """Context manager that remembers a signal until the loop asks for it, and says so.

    Ctrl-C (SIGINT) waits for the loop only inside `steps`. Before the first step and after the last one there is nothing
    to save, so it ends the run at once; with several ranks after RANKS_END_S, since one may wait for another for an hour.

    A second signal ends the process at once, even one that waits for another rank. Within REPEATED_S it counts as the
    first one: a signal to a whole process group arrives twice if the launcher in the group forwards it. After Ctrl-C that
    time is short, for a person who presses it again; torchrun forwards a second Ctrl-C as SIGTERM.

    kept: what a run that Ctrl-C ends at once leaves; part of its message.
    obeyed: how a run outside of the steps obeys another signal; part of the announcement.
    """

    def __init__(self, world: World) -> None:
        self.kept = "ended before the first step; nothing was there to save"
        self.obeyed = "saves and ends before the first step"
        self._world = world
        self._number = 0
        self._in_steps = self._at_once = False
        self._previous: dict[int, object] = {}
        self._watcher: threading.Thread | None = None

    def asked(self) -> int:
        """Return the number of the signal that any rank received, or 0. Collective."""
        return int(self._world.max(torch.tensor(self._number)))

    @contextmanager
    def steps(self) -> Iterator[None]:
        """Context in which Ctrl-C waits for `asked`."""
        self._in_steps = True
        try:
            yield
        finally:
            self._in_steps = False
            self.obeyed = "ends when the model is saved"
        if self._number == signal.SIGINT:  # it came after the last time that the loop asked
            self._remember(self._number, None)

    def __enter__(self) -> "Interruptions":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            caught = [number for number in SIGNALS if not (nohup and number == signal.SIGHUP)]
            self._previous = {number: signal.signal(number, self._remember) for number in caught}
            # Python calls handlers between two of its own instructions, which may never come while the main thread waits
            # for another rank. The pipe gets every signal's number at once.
            reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
            self._watcher = threading.Thread(target=self._watch, args=[reader], name="signals", daemon=True)
            self._watcher.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _) -> None:
        """Raises:
        Interrupted: Ctrl-C ended the run at once. It replaces the error that this caused, here or on another rank.
        """
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
        if self._watcher is not None:
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._writer)
            self._watcher.join()
            self._watcher = None
        if self._at_once and error is not None and not isinstance(error, UserError | Interrupted):
            raise Interrupted(signal.SIGINT, self.kept) from None

    def _remember(self, number: int, _) -> None:
        self._number = self._number or number
        if number == signal.SIGINT and not self._in_steps:
            self._at_once = True
            raise KeyboardInterrupt

    def _watch(self, reader: int) -> None:
        """Runs in a thread: announce the first signal, and end the process at the second one, or if Ctrl-C cannot."""
        since = deadline = None
        with open(reader, "rb", buffering=0) as arrived:
            while True:
                left = None if deadline is None else max(deadline - time.monotonic(), 0)
                if not select.select([arrived], [], [], left)[0]:
                    deadline = None
                    end_now(signal.SIGINT, self.kept)
                    continue
                if not (number := arrived.read(1)):
                    return
                (number,) = number
                if number not in SIGNALS:
                    continue
                if since is None:
                    since, repeated_s = time.monotonic(), AFTER_CTRL_C_S if number == signal.SIGINT else REPEATED_S
                    self._announce(number)
                elif time.monotonic() - since > repeated_s:
                    end_now(number)
                if number == signal.SIGINT and not self._in_steps and self._world.size > 1 and deadline is None:
                    deadline = time.monotonic() + RANKS_END_S

    def _announce(self, number: int) -> None:
        if self._in_steps:
            how = "saves and ends at the end of this step"
            how += "; a second Ctrl-C ends it at once" if number == signal.SIGINT else ""
        elif number != signal.SIGINT:
            how = self.obeyed
        elif self._world.size > 1:
            how = f"ends, within {RANKS_END_S:.0f} s on every rank"
        else:
            return  # it has ended before one could read this
        if self._world.is_main:
            print(f"mssr: {signal.Signals(number).name}: the run {how}", file=sys.stderr, flush=True)


def end_now(number: int, why: str = "second signal, ended at once; go on with --resume") -> None:
    """End this process without clean-up, from any thread. Files are safe: a kill may come at any moment."""
    below_display = "\x1b[?25h\n" if sys.stderr.isatty() else ""  # which hides the cursor
    text = f"{below_display}mssr: {signal.Signals(number).name}: {why}\n"
    with suppress(OSError):  # nobody reads it any more
        os.write(2, text.encode() if os.environ.get("RANK", "0") == "0" else b"")
    os._exit(128 + number)
