"""`metrics.jsonl`, the record of a run that a resumed run continues."""

import json
import math
import os
import time
from contextlib import suppress
from pathlib import Path

from mssr.errors import UserError
from mssr.outputs import set_aside

FILE_NAME = "metrics.jsonl"


Metric = float | list  # lists (tables, histograms) are for this file only


class MetricsLog:
    """Appends one JSON object per line: `step`, `time` (unix), then `group/name` floats or lists of finite numbers.

    resume_at: `position` from the checkpoint; later lines, complete or not, are dropped. 0: there is no checkpoint, so a
        file that is there is renamed. None: a new run.
    dropped: number of complete lines that were dropped. set_aside: new name of the renamed file, or None.

    Raises:
        UserError: the metrics of another run are there, or the file ends before `resume_at`.
    """

    def __init__(self, run_dir: Path, *, resume_at: int | None = None) -> None:
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        self.path = run_dir / FILE_NAME
        self.dropped, self.set_aside = 0, None
        if resume_at is None:
            self._refuse_old_metrics()
        elif resume_at == 0:
            if self.path.exists() and self.path.stat().st_size:
                self.set_aside = set_aside(self.path)
        else:
            self._cut(resume_at)
        self._file = self.path.open("ab")

    def write(self, step: int, values: dict[str, Metric]) -> None:
        """Append a line and flush it: kill -9 can cut off only the line being written."""
        record = {"step": step, "time": round(time.time(), 3)}
        record |= values | {key: finite_or_none(value) for key, value in scalars_of(values).items()}
        try:
            self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self.path}: cannot write metrics: {error.strerror}") from error

    @property
    def position(self) -> int:
        """Bytes on disk so far; synced, since a checkpoint must not point beyond what survives a power cut."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(f"{self.path}: cannot write metrics: {error.strerror}") from error
        return self._file.tell()

    def close(self) -> None:
        with suppress(OSError):  # every line was flushed; one that could not be is tried again here
            self._file.close()

    def _refuse_old_metrics(self) -> None:
        if self.path.exists() and self.path.stat().st_size:
            raise UserError(
                f"{self.path} holds a run's metrics: set another run_dir, or continue that run with --resume"
            )

    def _cut(self, size: int) -> None:
        content = self.path.read_bytes() if self.path.exists() else b""
        if content[size - 1 : size] != b"\n":  # too short, or edited
            raise UserError(
                f"{self.path} has no line that ends at byte {size}, where the checkpoint was saved: "
                "restore the file, or start in another run_dir"
            )
        self.dropped = content.count(b"\n", size)
        with self.path.open("ab") as file:
            file.truncate(size)


def read_metrics(path: Path) -> list[dict[str, Metric]]:
    """Return the lines of a `metrics.jsonl`, null as NaN, without a last line that a kill cut off.

    Raises:
        UserError: no such file, or a line other than the last is not one of metrics.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except FileNotFoundError:
        raise UserError(f"{path}: no such metrics file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number}: not JSON; restore the file") from None
        if not isinstance(record, dict) or not _are_metrics(record):
            raise UserError(f"{path}, line {number}: no metrics of a step; expected a metrics.jsonl of mssr")
        records.append({key: math.nan if value is None else value for key, value in record.items()})
    return records


def scalars_of(values: dict[str, Metric]) -> dict[str, float]:
    return {key: float(value) for key, value in values.items() if not isinstance(value, list)}


def _are_metrics(record: dict) -> bool:
    return "step" in record and all(value is None or isinstance(value, int | float | list) for value in record.values())


def finite_or_none(value: float | None) -> float | None:
    """Return None for NaN and infinity, which JSON does not have."""
    return value if value is not None and math.isfinite(value) else None
