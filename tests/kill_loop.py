"""Kill `mssr train` and `mssr sft` at random moments, and check that a resumed run reaches the same end.

    python tests/kill_loop.py 20        # 20 kills of each command, by Ctrl-C or kill -9

Each run is stopped once to three times, at random times within its usual duration, and then resumed to its end. Its
metrics and weights must equal those of a run that was never stopped, and no process may be left.
"""

import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path

sys.path.extend([str(Path(__file__).parents[1]), str(Path(__file__).parent / "training")])

from material import write_material
from mssr_process import Launcher, ends_within
from run_folder import RunFolder

MARK = "MSSR_KILL_LOOP"  # in the environment of every process of a run
COMMANDS = {
    "train": ["algorithm.tracker.n_init=1", "train.async_save=true"],
    "sft": ["sft.steps=8", "sft.eval_every=4", "sft.optimizer.schedule=cosine"],
}


class Loop:
    """One command, and an uninterrupted run of it to compare with."""

    def __init__(self, mssr: Launcher, command: list[str], folder: Path) -> None:
        self._mssr, self._command = mssr, command
        self._whole = RunFolder(folder)
        started = time.monotonic()
        mssr(*command, self._whole.override).check()
        self._seconds = time.monotonic() - started  # that a run takes

    def stop_and_resume(self, folder: RunFolder, numbers: list[int], chance: random.Random) -> list[str]:
        """Stop a run by each of these signals, then let it end. Return what happened, a line per signal that stopped it."""
        story = []
        for number in numbers:
            started = self._mssr.start(*self._command, folder.override, "--resume", **{MARK: str(folder.path)})
            moment = chance.uniform(0, self._seconds)
            if ends_within(started.pid, moment):
                started.wait().check()
                self._seconds *= 0.8  # the machine is less busy now
                break
            os.kill(started.pid, number)
            ended = started.wait()
            assert ended.code in (0, -9 if number == signal.SIGKILL else 130), (ended.code, ended.err)
            told = ended.err.splitlines()[-1] if number == signal.SIGINT and ended.code else ""
            if ended.code:
                story.append(f"{signal.Signals(number).name} after {moment:.2f} s {told}")
        self._mssr(*self._command, folder.override, "--resume").check()
        folder.assert_same_as(self._whole)
        assert not (left := processes_of(folder.path)), left
        return story


def processes_of(folder: Path) -> list[str]:
    """Return the processes that a run in this folder has started and that are still there after ten seconds."""
    deadline = time.monotonic() + 10  # a worker notices that the trainer is gone when its input ends
    while True:
        mark, found = f"{MARK}={folder}".encode(), []
        for process in Path("/proc").iterdir():
            with suppress(OSError):
                if process.name.isdigit() and mark in (process / "environ").read_bytes().split(b"\0"):
                    found.append(process.name)
        if not found or time.monotonic() > deadline:
            return found


def loop(mssr: Launcher, name: str, config: Path, folder: Path, kills: int, seed: int = 0) -> Iterator[list[str]]:
    """Stop runs of `mssr NAME` until `kills` signals have stopped one. Yield what happened to each run."""
    one = Loop(mssr, [name, str(config), *COMMANDS[name]], folder / f"{name}_whole")
    chance = random.Random(seed)
    runs, stops = count(), 0
    while stops < kills:
        numbers = [chance.choice([signal.SIGKILL, signal.SIGINT]) for _ in range(chance.randint(1, 3))]
        story = one.stop_and_resume(RunFolder(folder / f"{name}_{next(runs)}"), numbers, chance)
        stops += len(story)
        yield story


def main() -> None:
    kills = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        material = write_material(folder)
        with Launcher(folder, material / "untrained") as mssr:
            mssr("sft", material / "config.yaml", f"run_dir={folder / 'start'}").check()
            warm = folder / "warm.yaml"
            text = (material / "config.yaml").read_text()
            warm.write_text(text.replace(str(material / "untrained"), str(folder / "start" / "model")))
            for name in COMMANDS:
                for story in loop(mssr, name, warm, folder, kills):
                    print(f"{name}: the same end after {'; '.join(story) or 'nothing'}", flush=True)


if __name__ == "__main__":
    main()
