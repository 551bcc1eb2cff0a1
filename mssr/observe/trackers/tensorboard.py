"""TensorBoard: event files, written in the trainer's process. It has no tables, so rollouts are on their page only."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from mssr.observe.trackers.base import Start


class Tracker:
    id = ""

    def __init__(self, start: Start) -> None:
        from torch.utils.tensorboard import SummaryWriter  # imports for a second

        self.place = str(start.folder)
        self._writer = SummaryWriter(start.folder, purge_step=start.first_step)  # hides repeated steps
        rows = "".join(f"| {key} | {json.dumps(value)} |\n" for key, value in start.config.items())
        self._writer.add_text("config", f"| key | value |\n|---|---|\n{rows}", start.first_step)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def rollouts(self, step: int, table: dict[str, list]) -> None:
        pass

    def curves(self, step: int, picture: Path) -> None:
        with Image.open(picture) as image:
            self._writer.add_image("curves", np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self, ok: bool) -> None:
        self._writer.close()
