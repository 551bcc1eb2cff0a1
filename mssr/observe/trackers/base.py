"""What an experiment tracker does. Each is a class `Tracker` in a file with its name, which imports its library."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Start:
    """What a tracker knows of the run when it starts.

    folder: for what it writes, absolute; it exists. The library's own environment variables may name another place.
    config: the settings, by dotted key.
    first_step: of the metrics that come. After a crash, a tracker may have seen it and later ones before.
    id: of the tracker's run to continue; None: start a new one.
    """

    folder: Path
    project: str
    name: str
    config: dict[str, Any]
    first_step: int
    id: str | None


class ExperimentTracker(Protocol):
    """One run in one tracker. id: continues it later. place: where to look at it."""

    id: str
    place: str

    def __init__(self, start: Start) -> None: ...

    def scalars(self, step: int, values: dict[str, float]) -> None: ...

    def rollouts(self, step: int, table: dict[str, list]) -> None:
        """table: the cells of each column, all of one length; a Path is a picture."""

    def curves(self, step: int, picture: Path) -> None: ...

    def close(self, ok: bool) -> None:
        """ok: the run has reached its end."""


def table(records: list[dict[str, Any]]) -> dict[str, list]:
    """Return the columns of saved rollouts (`mssr.observe.rollouts`); a part of the reward, or a picture, has its own."""
    rows = [_cells(record) for record in records]
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: [row.get(name) for row in rows] for name in names}


def _cells(record: dict[str, Any]) -> dict[str, Any]:
    cells: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            cells |= {f"{name}/{key}": inner for key, inner in value.items()}
        elif name == "images":
            cells |= {f"image {number}": path for number, path in enumerate(value, start=1)}
        else:
            cells[name] = value
    return cells
