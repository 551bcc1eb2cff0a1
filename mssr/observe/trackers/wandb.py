"""Weights & Biases. WANDB_MODE=offline writes files for `wandb sync`; other variables: WANDB_API_KEY, _ENTITY, _BASE_URL."""

import os
from pathlib import Path

from mssr.observe.trackers.base import Start


class Tracker:
    def __init__(self, start: Start) -> None:
        os.environ.setdefault("WANDB_DIR", str(start.folder.parent))  # it appends wandb/
        for kind in ("CACHE", "DATA"):
            os.environ.setdefault(f"WANDB_{kind}_DIR", str(start.folder / kind.lower()))
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            project=start.project, name=start.name, config=start.config, id=start.id, resume="allow",
            settings=wandb.Settings(console="off", x_stats_pid=os.getppid()),  # the trainer's process
        )  # fmt: skip
        # W&B drops what has a lower step of its own than before, so the training step is a metric, and repeated steps stay.
        self._run.define_metric("*", step_metric="step")
        self.id, self.place = self._run.id, self._run.url or f"wandb sync {Path(self._run.dir).parent}"

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step} | values)

    def rollouts(self, step: int, table: dict[str, list]) -> None:
        rows = [[self._cell(cell) for cell in row] for row in zip(*table.values())]
        self._run.log({"step": step, "rollouts": self._wandb.Table(columns=list(table), data=rows)})

    def _cell(self, cell):
        return self._wandb.Image(str(cell)) if isinstance(cell, Path) else cell

    def curves(self, step: int, picture: Path) -> None:
        self._run.log({"step": step, "curves": self._wandb.Image(str(picture))})

    def close(self, ok: bool) -> None:
        self._run.finish(exit_code=0 if ok else 1)
