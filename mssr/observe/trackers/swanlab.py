"""SwanLab. SWANLAB_MODE=offline writes files for `swanlab sync`; other variables: SWANLAB_API_KEY, _API_HOST, _LOG_DIR."""

import os
from pathlib import Path

from PIL import Image

from mssr.observe.trackers.base import Start


class Tracker:
    def __init__(self, start: Start) -> None:
        os.environ.setdefault("SWANLAB_LOG_DIR", str(start.folder))
        import swanlab

        self._swanlab = swanlab
        self._run = swanlab.init(
            project=start.project, name=start.name, config=start.config, id=start.id, resume="allow",
            settings=swanlab.Settings(terminal={"proxy_type": "none"}),
        )  # fmt: skip
        self.id = self._run.id
        self.place = self._run.url if self._run.mode == "online" else f"swanlab sync {self._run.dir}"

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def rollouts(self, step: int, table: dict[str, list]) -> None:
        """A table has no pictures in SwanLab: they are logged beside it, the row as their caption."""
        texts = {name: cells for name, cells in table.items() if not any(isinstance(cell, Path) for cell in cells)}
        rows = [list(map(str, row)) for row in zip(*texts.values())]
        pictures = [
            self._swanlab.Image(
                Image.open(cell).convert("RGB"),  # it writes PNG, which has no CMYK
                caption="\n".join(f"{name}: {value}" for name, value in zip(texts, rows[row])),
            )
            for name in table.keys() - texts.keys()
            for row, cell in enumerate(table[name])
            if cell is not None
        ]
        values = {"rollouts": self._swanlab.echarts.Table().add(list(texts), rows)}
        self._run.log(values | ({"rollouts/pictures": pictures} if pictures else {}), step=step)

    def curves(self, step: int, picture: Path) -> None:
        self._run.log({"curves": self._swanlab.Image(str(picture))}, step=step)

    def close(self, ok: bool) -> None:
        self._run.finish(state="success") if ok else self._run.finish(state="crashed", error="the run has not ended")
