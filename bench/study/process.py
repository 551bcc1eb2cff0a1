"""One run of a study as a process: its command, its environment, what it used, how it ended."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mssr.errors import UserError

LOG = "log.txt"
LINE_OF_AN_ERROR = "mssr: "  # as mssr.cli prints a user's mistake
DIVERGED_CODE = 3  # of mssr.cli
GRACE_S = 60.0  # what a run has to save its step after SIGTERM


@dataclass(frozen=True)
class Ended:
    """code: exit status, negative for a signal. cpu_seconds: user and system, of the process and all that it waited for."""

    code: int
    wall_seconds: float
    cpu_seconds: float


class Child:
    """A started run. `wait` blocks its thread; `stop` may come from another one."""

    def __init__(self, command: Sequence[str], env: dict[str, str], log: Path, lock: int) -> None:
        """lock: a descriptor that the process keeps open: as long as it lives, the study's folder is taken."""
        self._began = time.monotonic()
        with log.open("ab") as file:
            # A session of its own: Ctrl-C reaches the study alone, which then ends its runs one by one.
            self._process = subprocess.Popen(
                command,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(lock,),
            )

    def wait(self) -> Ended:
        _, status, usage = os.wait4(self._process.pid, 0)
        self._process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.monotonic() - self._began
        return Ended(self._process.returncode, wall, usage.ru_utime + usage.ru_stime)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """To the run and its ranks. SIGTERM lets a run save the step it is in."""
        if self._process.returncode is None:
            try:
                os.killpg(self._process.pid, number)
            except ProcessLookupError:  # it ended meanwhile
                return


def train_command(config: Path, overrides: list[str], ranks: int) -> list[str]:
    """--resume goes on from whatever the folder holds: nothing, records without a checkpoint, a checkpoint."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    return [sys.executable, *launcher, "-m", "mssr", "train", str(config), *overrides, "--resume"]


def environment(slot: int, ranks: int, gpus: list[str]) -> dict[str, str]:
    """Of the run in one of the study's slots: its share of the GPUs.

    OMP_NUM_THREADS stays as mssr.environment sets it, one thread a process, whatever the number of jobs: threads change the
    rounding, so that a run would not be the same run beside others; and two that have to wait for a core cost many times
    what they gain.
    """
    env = dict(os.environ)
    if gpus:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[(slot * ranks + rank) % len(gpus)] for rank in range(ranks))
    return env


def visible_gpus(ranks: int) -> list[str]:
    """Raises:
    UserError: a run has more ranks than there are GPUs.
    """
    import torch

    count = torch.cuda.device_count()
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in listed.split(",")][:count] if listed else [str(index) for index in range(count)]
    if 0 < len(names) < ranks:
        raise UserError(f"ranks {ranks}, but there are {len(names)} GPUs; set fewer ranks")
    return names


def last_line(log: Path) -> str:
    """Why a run ended: the last line that `mssr` wrote about an error, or the last one there is."""
    try:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except FileNotFoundError:
        lines = []
    told = [line for line in lines if line.startswith(LINE_OF_AN_ERROR)]
    return (told or lines or ["it wrote nothing"])[-1].removeprefix(LINE_OF_AN_ERROR)


def diverged(code: int, log: Path) -> bool:
    """Whether `mssr train` ended because it broke its policy (mssr.errors.Diverged). torchrun tells of it in its output."""
    if code == DIVERGED_CODE:
        return True
    return (
        code != 0
        and re.search(rf"^\s*exitcode\s*: {DIVERGED_CODE}\b", log.read_text(errors="replace"), re.M) is not None
    )


def write_whole(path: Path, text: str) -> None:
    """Or not at all: a signal may come at any moment."""
    partial = path.with_name(f".partial_{path.name}")
    partial.write_text(text)
    partial.replace(path)
