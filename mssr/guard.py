"""Processes that do not outlive the one that started them, however it ends: `kill -9` included.

`Guarded` starts this file as a small process in a session of its own, which runs the command and holds the reading end of a
pipe. When the pipe closes, because its only writer has died, the guard ends the command. All that the command started ends
with it: on Linux also what left its session, such as a daemon.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

GRACE_S = 60.0  # a training run saves its step
_FOR_THE_COMMAND = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)  # the guard outlives them
_AT_ONCE = b"!"
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # of linux/prctl.h


class Guarded(subprocess.Popen):
    """A process group that ends with us. Its exit status is the command's; `pid` is the guard's, and the group's.

    Signals for the command go to the group (`os.killpg`): the terminal's Ctrl-C reaches only us.
    """

    def __init__(
        self, command: Sequence[str], *, pass_fds: Sequence[int] = (), grace_s: float = GRACE_S, **options
    ) -> None:
        """grace_s: between SIGTERM and SIGKILL, when we have ended; 0: SIGKILL at once. options: of subprocess.Popen."""
        reader, writer = os.pipe()
        self._lifeline = os.fdopen(writer, "wb", buffering=0)  # not inherited; closes with this object
        guard = [sys.executable, "-I", "-S", __file__, str(reader), str(grace_s)]
        try:
            super().__init__([*guard, *command], pass_fds=(*pass_fds, reader), start_new_session=True, **options)
        except BaseException:
            self._lifeline.close()
            raise
        finally:
            os.close(reader)

    def finish(self) -> int:
        """Wait for its end and return the exit status. Ctrl-C is passed on, so that a training run can save.

        Any other exception, for example of a signal's handler, passes when the group has ended.
        """
        while True:
            try:
                return self.wait()
            except KeyboardInterrupt:
                self._signal(signal.SIGINT)
            except BaseException:
                self._signal(signal.SIGTERM)
                self.wait()
                raise

    def wait(self, timeout: float | None = None) -> int:
        code = super().wait(timeout)
        self._lifeline.close()
        return code

    def kill(self) -> None:
        """End the command, and all that it started, without grace; `wait` returns when that is done."""
        with contextlib.suppress(BrokenPipeError, ValueError):  # it has ended
            self._lifeline.write(_AT_ONCE)

    def _signal(self, number: int) -> None:
        if self.poll() is None:  # else the id may be another process's by now
            os.killpg(self.pid, number)


def signal_at_end_of_parent(number: int) -> None:
    """Let the kernel send this process a signal when its parent ends; on Linux only."""
    _prctl(_PR_SET_PDEATHSIG, number)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)


def main(lifeline: int, grace_s: float, command: list[str]) -> None:
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_COMMAND)  # one that comes now must reach the command
    child = os.fork()
    if child == 0:
        _become(command, lifeline)
    for number in _FOR_THE_COMMAND:
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FOR_THE_COMMAND)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # else who reads the command's output would wait for us too
        os.dup2(null, stream)
    orphaned = threading.Event()
    threading.Thread(target=_end_when_orphaned, args=(lifeline, grace_s, child, orphaned), daemon=True).start()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    _kill_the_rest(orphaned.is_set())
    if code < 0:  # end as the command did
        if -code not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _become(command: list[str], lifeline: int) -> None:
    os.close(lifeline)
    for number in _FOR_THE_COMMAND:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FOR_THE_COMMAND)
    signal_at_end_of_parent(signal.SIGKILL)  # in case someone kills the guard
    try:
        os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"{command[0]}: {error.strerror}\n".encode())
        os._exit(127)


def _end_when_orphaned(lifeline: int, grace_s: float, child: int, orphaned: threading.Event) -> None:
    said = os.read(lifeline, 1)
    orphaned.set()
    if said != _AT_ONCE and grace_s:
        os.killpg(0, signal.SIGTERM)
        time.sleep(grace_s)
    os.kill(child, signal.SIGKILL)  # if it had ended, so would this process have


def _kill_the_rest(orphaned: bool) -> None:
    """Kill what the ended command left behind: on Linux it has become a child of this process, its subreaper."""
    try:
        while children := Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
            for child in children:
                os.kill(int(child), signal.SIGKILL)
            os.wait()
    except FileNotFoundError:  # not Linux
        if orphaned:  # else the exit status would be lost
            os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])
