"""Checkpoints: everything a resumed run needs, and never a half-written one.

    run_dir/checkpoints/step_000040/    engine/     weights, optimiser, schedule (DeepSpeed, one file a rank)
                                        rank_0.pt   this rank's random state
                                        state.pt    step, tracker, metrics position, what the run was made of

A checkpoint is written under a temporary name, flushed to disk, and renamed when every rank is done; old ones are
removed after that. So kill -9 or a full disk at any moment leaves the last complete one as it was.
"""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from mssr.distributed import World
from mssr.errors import UserError
from mssr.policy.engine import PolicyEngine
from mssr.policy.weights import whole_shape

FOLDER = "checkpoints"
_NAME = re.compile(r"step_(\d{6,})")


class Checkpoints:
    def __init__(self, run_dir: Path, world: World, keep: int) -> None:
        self._folder = Path(run_dir) / FOLDER
        self._world = world
        self._keep = keep

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        if not self._folder.is_dir():
            return []
        matches = (_NAME.fullmatch(path.name) for path in self._folder.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def save(self, step: int, engine: PolicyEngine, state: dict[str, Any]) -> Path:
        """Saves `step` (the number of steps done); `state` is the loop's own, the same on every rank.

        Raises:
            UserError: it could not be written (disk full, permission); the previous checkpoint is intact.
        """
        final = self._folder / f"step_{step:06d}"
        partial = self._folder / f".partial_step_{step:06d}"
        try:
            self._prepare(engine)
            if self._world.is_main:
                partial.mkdir()
            self._world.barrier()
            self._write(partial, engine, {"step": step, **state})
            self._world.barrier()
            if self._world.is_main:
                _flush(partial)
                partial.rename(final)
                _flush_folder(self._folder)
                self._prune()
            self._world.barrier()
        # torch reports a failed write as RuntimeError. The other ranks are not told: they may be waiting inside
        # DeepSpeed's own collectives. This rank ends, and what they wait in fails, as RuntimeError too.
        except (OSError, RuntimeError) as error:
            if self._world.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            kept = self.steps()
            last = f"checkpoint of step {kept[-1]} is intact" if kept else "there is no earlier checkpoint"
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{final}: could not be saved: {reason}; {last}; make room and resume with --resume"
            ) from None
        return final

    def newest_state(self, *, resume: bool) -> dict[str, Any] | None:
        """The loop's state of the newest checkpoint; None for a run that has none.

        Raises:
            UserError: there are checkpoints, and the run is to start anew.
        """
        steps = self.steps()
        if not steps:
            return None
        if not resume:
            raise UserError(f"{self._folder} holds step {steps[-1]}; continue with --resume, or set another run_dir")
        return torch.load(self._folder / f"step_{steps[-1]:06d}" / "state.pt", weights_only=True)

    def load_engine(self, step: int, engine: PolicyEngine) -> None:
        """Restores weights, optimiser, schedule and this rank's random state."""
        folder = self._folder / f"step_{step:06d}"
        ranks = len(list(folder.glob("rank_*.pt")))
        if ranks != self._world.size:
            raise UserError(
                f"{folder} was saved by {ranks} ranks, this run has {self._world.size}; resume with as many"
            )
        engine.load(folder)
        states = torch.load(folder / f"rank_{self._world.rank}.pt", weights_only=True)
        torch.set_rng_state(states["cpu"])
        if "cuda" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state(states["cuda"])

    def _prepare(self, engine: PolicyEngine) -> None:
        """Clears what an interrupted save left; refuses, on all ranks at once, a disk that is full beforehand."""
        shortage = None
        if self._world.is_main:
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in self._folder.glob(".partial_*"):
                shutil.rmtree(path)
            steps = self.steps()
            if steps:
                needed = sum(path.stat().st_size for path in (self._folder / f"step_{steps[-1]:06d}").rglob("*"))
            else:  # weights and the optimiser's two moments, float32
                needed = 12 * sum(whole_shape(parameter).numel() for parameter in engine.policy.parameters())
            free = shutil.disk_usage(self._folder).free
            if free < needed:
                shortage = f"disk full: {free / 2**20:.0f} MiB free, about {needed / 2**20:.0f} MiB needed"
        shortage = self._world.gather(shortage)[0]
        if shortage:
            raise OSError(shortage)

    def _write(self, folder: Path, engine: PolicyEngine, state: dict[str, Any]) -> None:
        engine.save(folder)
        random_state = {"cpu": torch.get_rng_state()}
        if self._world.device.type == "cuda":
            random_state["cuda"] = torch.cuda.get_rng_state()
        torch.save(random_state, folder / f"rank_{self._world.rank}.pt")
        if self._world.is_main:
            torch.save(state, folder / "state.pt")

    def _prune(self) -> None:
        for step in self.steps()[: -self._keep]:
            old = self._folder / f"step_{step:06d}"
            doomed = self._folder / f".partial_{old.name}"
            old.rename(doomed)  # a removal cut short must not look like a checkpoint
            shutil.rmtree(doomed)


def _flush(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            with open(Path(root) / name, "rb") as file:
                os.fsync(file.fileno())
        _flush_folder(Path(root))


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
