"""One run of a study as a process: command, environment, and the reason why it ended."""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from mssr.errors import UserError

LOG = "log.txt"
LINE_OF_AN_ERROR = "mssr: "  # prefix of error messages of mssr.cli
_OF_THE_LAUNCHER = re.compile(r"mssr: rank \d+ (ended with|was ended by) ")  # the last line, of mssr.launch
DIVERGED_CODE = 3  # of mssr.cli, when training diverged (mssr.errors.Diverged); mssr.launch passes it on
GRACE_S = 60.0  # seconds that a run has to save its step after SIGTERM


def train_command(config: Path, overrides: list[str], ranks: int) -> list[str]:
    """Return the command of a run. --resume works with an empty folder, one with records only, or a checkpoint."""
    launcher = ["-m", "mssr.launch", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    return [sys.executable, *launcher, "-m", "mssr", "train", str(config), *overrides, "--resume"]


def environment(slot: int, ranks: int, gpus: list[str]) -> dict[str, str]:
    """Return the environment of the run in a slot: ours, with the slot's share of the GPUs.

    OMP_NUM_THREADS stays as mssr.environment sets it, one thread per process for any number of jobs: the number of threads
    changes the rounding, so results would depend on `jobs`; and threads that wait for a core slow a run down.
    """
    env = dict(os.environ)
    if gpus:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[(slot * ranks + rank) % len(gpus)] for rank in range(ranks))
    return env


def visible_gpus(ranks: int) -> list[str]:
    """Return the GPUs that runs may use, as CUDA_VISIBLE_DEVICES names them.

    Raises:
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
    """Return why a run ended: its last `mssr: ` line, or else its last line; the launcher's only if there is no other."""
    try:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except FileNotFoundError:
        lines = []
    others = [line for line in lines if not _OF_THE_LAUNCHER.match(line)]
    told = [line for line in others if line.startswith(LINE_OF_AN_ERROR)]
    return (told or others or lines or ["no output"])[-1].removeprefix(LINE_OF_AN_ERROR)


def read_lines(log: Path) -> list[dict[str, Any]]:
    """Return the objects of a file with one per line; none if there is no file.

    Raises:
        UserError: a line is damaged.
    """
    try:
        lines = log.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    return [_parsed(line, f"{log}, line {number}", "remove the line") for number, line in enumerate(lines, start=1)]


def read_object(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        UserError: the file is damaged.
    """
    return _parsed(file.read_bytes(), str(file), "remove the file")


def _parsed(text: bytes, where: str, remedy: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{where}: damaged; {remedy}, and run the study again, which goes on from there")
    return found


def append_line(log: Path, value: dict[str, Any]) -> None:
    """Append an object to a file of `read_lines`."""
    with log.open("a") as file:
        file.write(json.dumps(value) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write the whole file or nothing: a signal may come at any moment."""
    partial = path.with_name(f".partial_{path.name}")
    partial.write_text(text)
    partial.replace(path)
