"""Checkpoints: everything a resumed run needs, and never a half-written one.

    run_dir/checkpoints/step_000040/    rank_0.pt   this rank's pieces of master weights and moments, its random state
                                        state.pt    step, ranks, shapes and updates, metrics position; the loop's parts
                                                    (tracker, costs, ...); what tells that a run is the same; the best
                        best.json       step and accuracy of the best validation (train.keep_best), for people

A checkpoint is copied to host memory, written by a background thread under a temporary name, flushed to disk, and renamed
when every rank is done; then old ones are removed. So kill -9 or a full disk at any moment leaves the last complete
checkpoint intact. Any number of ranks and any ZeRO stage can resume it.
"""

import io
import json
import re
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mssr import torch_file
from mssr.config.schema import TrainConfig
from mssr.distributed import World
from mssr.errors import UserError, shortened
from mssr.outputs import ANYTHING, note, remove
from mssr.policy.engine import PolicyEngine
from mssr.policy.pieces import VALUES, SavedPieces
from mssr.policy.weights import whole_shape

FOLDER = "checkpoints"
_NAME = re.compile(r"step_(\d{6,})")
_BEST = "best.json"
_UNFINISHED = re.compile(r"\.partial_(step_\d{6,}|best\.json)")
_FILE = re.compile(r"state\.pt|rank_\d+\.pt")


class Checkpoints:
    """Saves and loads the checkpoints of a run. Call every method on all ranks."""

    def __init__(self, run_dir: Path, world: World, config: TrainConfig) -> None:
        self._folder = Path(run_dir) / FOLDER
        self._world = world
        self._config = config
        self._saved_at = time.monotonic()
        self._pending: tuple[int, Future] | None = None  # step and writer of an unfinished checkpoint
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._best: dict[str, Any] | None = None  # step and accuracy, one still being written included

    def newest_state(self, *, resume: bool) -> dict[str, Any] | None:
        """Return the loop's state in the newest checkpoint, or None without checkpoints.

        Raises:
            UserError: there is a checkpoint, and the run is not resumed; it is damaged, or an earlier version's; or ranks
                see different folders.
        """
        newest = self._world.gather(max(saved_steps(self._folder), default=None))
        if newest[0] is None:
            return None
        if any(step != newest[0] for step in newest):
            raise UserError(f"{self._folder}: its newest step is {newest} by rank; run_dir must be shared by all nodes")
        if not resume:
            raise UserError(f"{self._folder} holds step {newest[0]}; continue with --resume, or set another run_dir")
        with self._world.together():
            state = read_state(self._path(newest[0]))
        if "best" not in state:
            raise UserError(
                "the checkpoint was saved by an earlier version of mssr; resume with that, or set another run_dir"
            )
        self._best = state["best"]
        return state

    def foreign_outputs(self) -> list[str]:
        """Return the checkpoints' folder for `Run.refuse_foreign_outputs` if it has files but no checkpoint of this run."""
        is_foreign = self._folder.is_dir() and any(self._folder.iterdir()) and not saved_steps(self._folder)
        return [FOLDER] if is_foreign else []

    def load_engine(self, state: dict[str, Any], engine: PolicyEngine) -> None:
        """Restore weights, optimiser and schedule of `newest_state`, and this rank's random state if there is one.

        Raises:
            UserError: files are missing or damaged, or another model was trained.
        """
        with self._world.together():
            files = _rank_files(self._path(state["step"]), state)
        engine.load(state["engine"], SavedPieces([file["pieces"] for file in files]))
        if self._world.rank < len(files):
            random_state = files[self._world.rank]["random"]
            torch.set_rng_state(random_state["cpu"].clone())
            if "cuda" in random_state and torch.cuda.is_available():
                torch.cuda.set_rng_state(random_state["cuda"].clone())

    def due(self, step: int) -> bool:
        """Return whether a checkpoint is due, by step number or by the last checkpoint's age."""
        if step % self._config.checkpoint_every == 0:
            return True
        if self._config.checkpoint_minutes is None:
            return False
        old = time.monotonic() - self._saved_at >= 60 * self._config.checkpoint_minutes
        return bool(self._world.max(torch.tensor(int(old))))

    def is_best(self, accuracy: float) -> bool:
        """Return whether `accuracy` beats the best checkpoint so far."""
        return self._best is None or accuracy > self._best["accuracy"]

    def save(self, step: int, engine: PolicyEngine, state: dict[str, Any], *, best: float | None = None) -> None:
        """Start to save after `step` steps; an unfinished earlier save ends first. With async_save `settle` ends this one.

        state: the loop's own, the same on every rank. best: accuracy, for a checkpoint to keep as the best.

        Raises:
            UserError: this or the earlier one could not be written (disk full, permission); complete ones are intact.
        """
        self.settle(wait=True)
        if best is not None:
            self._best = {"step": step, "accuracy": best}
        partial = self._partial(step)
        with self._together(step):
            self._make_room(partial, engine)
        with self._together(step):
            contents = self._contents(step, engine, state)
        self._pending = step, self._thread.submit(_write, partial, contents)
        self._saved_at = time.monotonic()
        self.settle(wait=not self._config.async_save)

    def settle(self, *, wait: bool = False) -> None:
        """Complete the unfinished checkpoint if all ranks have written their files; wait: until they have.

        Raises:
            UserError: a rank could not write.
        """
        if self._pending is None:
            return
        step, writing = self._pending
        if not wait and not all(self._world.gather(writing.done())):
            return
        self._pending = None
        with self._together(step):
            writing.result()
        with self._together(step):
            self._commit(step)
        self._prune()

    def close(self) -> None:
        """Complete an unfinished checkpoint on a single rank; other ranks may be gone."""
        try:
            if self._world.size == 1:
                self.settle(wait=True)
        finally:
            self._thread.shutdown()

    def _contents(self, step: int, engine: PolicyEngine, state: dict[str, Any]) -> dict[str, Any]:
        """Return this rank's file contents by file name; copies, because training continues."""
        contents = {f"rank_{self._world.rank}.pt": {"pieces": engine.own_state(), "random": self._random_state()}}
        whole = {"step": step, "ranks": self._world.size, "engine": engine.state_dict(), "best": self._best, **state}
        if self._world.is_main:
            buffer = io.BytesIO()
            torch.save(whole, buffer)
            contents["state.pt"] = buffer.getvalue()
        return contents

    @contextmanager
    def _together(self, step: int) -> Iterator[None]:
        """Context that ends alike on all ranks, with the same error if writing fails on one."""
        try:
            with self._world.together():
                try:
                    yield
                except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
                    cause = error.__context__ if isinstance(error.__context__, OSError) else error
                    kept = saved_steps(self._folder)
                    last = f"checkpoint of step {kept[-1]} is intact" if kept else "there is no earlier checkpoint"
                    raise UserError(
                        f"{self._path(step)}: could not be saved: {shortened(cause, 200)}; {last}; make room and train "
                        "with --resume"
                    ) from None
        except UserError:
            if self._world.is_main:
                remove(self._partial(step))
            raise

    def _make_room(self, partial: Path, engine: PolicyEngine) -> None:
        """Remove the remains of interrupted saves, and check for free disk space."""
        if not self._world.is_main:
            return
        steps = saved_steps(self._folder)
        if not steps:
            self._folder.parent.mkdir(parents=True, exist_ok=True)
            note(self._folder.parent, FOLDER, ANYTHING)
            self._folder.mkdir(exist_ok=True)
        for path in filter(lambda path: _UNFINISHED.fullmatch(path.name), self._folder.iterdir()):
            remove(path)
        if steps:
            needed = sum(path.stat().st_size for path in self._path(steps[-1]).rglob("*"))
        else:
            trained = (weight for weight in engine.policy.parameters() if weight.requires_grad)
            needed = 4 * len(VALUES) * sum(whole_shape(weight).numel() for weight in trained)
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            raise OSError(f"disk full: {free / 2**20:.0f} MiB free, about {needed / 2**20:.0f} MiB needed")
        partial.mkdir()

    def _random_state(self) -> dict[str, Tensor]:
        state = {"cpu": torch.get_rng_state()}
        if self._world.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state()
        return state

    def _commit(self, step: int) -> None:
        if not self._world.is_main:
            return
        self._partial(step).rename(self._path(step))
        if self._best is not None:
            _write(self._folder, {f".partial_{_BEST}": json.dumps(self._best).encode() + b"\n"})
            (self._folder / f".partial_{_BEST}").rename(self._folder / _BEST)
        torch_file.flush_folder(self._folder)

    def _prune(self) -> None:
        """Remove old checkpoints. What fails, such as one that another host still reads, is tried again at the next save."""
        if not self._world.is_main:
            return
        best = self._best and self._best["step"]
        with suppress(OSError):
            for step in saved_steps(self._folder)[: -self._config.keep_checkpoints]:
                if step != best and _has_only_ours(self._path(step)):
                    # An interrupted removal must not look like a checkpoint.
                    self._path(step).rename(self._partial(step))
                    remove(self._partial(step))

    def _path(self, step: int) -> Path:
        return self._folder / _name(step)

    def _partial(self, step: int) -> Path:
        return self._folder / f".partial_{_name(step)}"


def _name(step: int) -> str:
    return f"step_{step:06d}"


def saved_steps(folder: Path) -> list[int]:
    """Return the steps of the complete checkpoints in a run's checkpoints folder, ascending."""
    if not folder.is_dir():
        return []
    matches = (_NAME.fullmatch(path.name) for path in folder.iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in matches if match)


def _has_only_ours(folder: Path) -> bool:
    """Return whether a checkpoint may be removed: it is a folder, no link, without files that somebody added."""
    return not folder.is_symlink() and all(_FILE.fullmatch(path.name) for path in folder.iterdir())


def read_state(folder: Path) -> dict[str, Any]:
    """Return the loop's state in the checkpoint in `folder` (step_000040).

    Raises:
        UserError: the file is missing or damaged; names the step to fall back to.
    """
    return _read(folder / "state.pt", {"step", "ranks", "engine"})


def read_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield every trained parameter of the checkpoint in `folder` (step_000040) by name, unsharded and in float32.

    Raises:
        UserError: files are missing or damaged; names the step to fall back to.
    """
    state = read_state(folder)
    saved = SavedPieces([file["pieces"] for file in _rank_files(folder, state)])
    for name, shape in state["engine"]["shapes"].items():
        weight = torch.empty(shape)
        saved.fill(name, "master", 0, weight.view(-1))
        yield name, weight


def _rank_files(folder: Path, state: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the contents of every rank's file, memory-mapped."""
    return [_read(folder / f"rank_{rank}.pt", {"pieces", "random"}, mmap=True) for rank in range(state["ranks"])]


def _read(file: Path, keys: set[str], *, mmap: bool = False) -> dict[str, Any]:
    try:
        return torch_file.read(file, keys, mmap=mmap)
    except torch_file.Damaged as damaged:
        folder = file.parent
        if not folder.exists():
            raise UserError(
                f"{folder}: removed while it was read: a run keeps the newest train.keep_checkpoints; take a newer one"
            ) from None
        others = (step for step in reversed(saved_steps(folder.parent)) if _name(step) != folder.name)
        whole = next((step for step in others if _is_whole(folder.with_name(_name(step)))), None)
        back = (
            f"step {whole} is whole; to go on from there, remove {folder}"
            if whole is not None
            else "no other checkpoint is whole; set another run_dir to start again"
        )
        raise UserError(f"{file}: {damaged}; {back}") from None


def _is_whole(folder: Path) -> bool:
    try:
        state = torch_file.read(folder / "state.pt", {"ranks"})
        for rank in range(state["ranks"]):
            torch_file.read(folder / f"rank_{rank}.pt", {"pieces"}, mmap=True)
    except torch_file.Damaged:
        return False
    return True


def _write(folder: Path, contents: dict[str, Any]) -> None:
    """Write each value to a file of its name, flushed to disk."""
    for name, value in contents.items():
        torch_file.write(folder / name, value)
    torch_file.flush_folder(folder)
