"""MLflow: an SQLite file and a folder of artifacts, unless MLFLOW_TRACKING_URI names a server."""

import os
import re
from pathlib import Path
from typing import Any

from PIL import Image

from mssr.observe.trackers.base import Start


class Tracker:
    def __init__(self, start: Start) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it writes to the home folder, and needs a network
        import mlflow

        self._mlflow = mlflow
        if "MLFLOW_TRACKING_URI" not in os.environ:
            mlflow.set_tracking_uri(f"sqlite:///{start.folder / 'mlflow.db'}")
            # MLflow's default for artifacts is the working directory.
            if mlflow.get_experiment_by_name(start.project) is None:
                mlflow.create_experiment(start.project, artifact_location=(start.folder / "artifacts").as_uri())
        mlflow.set_experiment(start.project)
        self.id = mlflow.start_run(run_id=start.id, run_name=start.name).info.run_id
        self.place = f"{mlflow.get_tracking_uri()}, run {self.id}"
        if start.id is None:
            mlflow.log_params(_names(start.config))  # of the start: MLflow refuses other values later
        mlflow.log_dict(start.config, "config.json")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._mlflow.log_metrics(_names(values), step=step)

    def rollouts(self, step: int, table: dict[str, list]) -> None:
        columns = {name: self._column(cells) for name, cells in table.items()}
        self._mlflow.log_table(columns, f"rollouts/step_{step:06d}.json")  # a repeated step adds its rows

    def _column(self, cells: list) -> list:
        if not any(isinstance(cell, Path) for cell in cells):
            return cells
        # No holes; and it writes PNG, which has no CMYK.
        pictures = [Image.open(cell).convert("RGB") if cell else Image.new("L", (1, 1)) for cell in cells]
        return [self._mlflow.Image(picture) for picture in pictures]

    def curves(self, step: int, picture: Path) -> None:
        self._mlflow.log_artifact(str(picture))

    def close(self, ok: bool) -> None:
        self._mlflow.end_run("FINISHED" if ok else "FAILED")


def _names(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values under names that MLflow takes; it refuses others."""
    return {re.sub(r"[^\w\-. :/]", "_", key): value for key, value in values.items()}
