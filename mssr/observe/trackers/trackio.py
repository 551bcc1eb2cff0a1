"""Trackio: an SQLite file per project, unless TRACKIO_SPACE_ID or TRACKIO_SERVER_URL names another place."""

import os
from pathlib import Path

from mssr.observe.trackers.base import Start


class Tracker:
    def __init__(self, start: Start) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(start.folder))
        import trackio

        self._trackio = trackio
        self.id = start.id or start.name  # Trackio finds a run by its name, and takes the newest of them
        self._run = trackio.init(
            project=start.project, name=self.id, config=start.config, embed=False,
            resume="allow" if start.id else "never",
        )  # fmt: skip
        self.place = self._run.url or f"TRACKIO_DIR={os.environ['TRACKIO_DIR']} trackio show --project {start.project}"

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def rollouts(self, step: int, table: dict[str, list]) -> None:
        rows = [[self._cell(cell) for cell in row] for row in zip(*table.values())]
        self._run.log({"rollouts": self._trackio.Table(columns=list(table), data=rows)}, step=step)

    def _cell(self, cell):
        return self._trackio.Image(cell) if isinstance(cell, Path) else cell

    def curves(self, step: int, picture: Path) -> None:
        self._run.log({"curves": self._trackio.Image(picture)}, step=step)

    def close(self, ok: bool) -> None:
        self._trackio.finish()
