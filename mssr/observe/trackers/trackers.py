"""The trackers of a run (`log.trackers`): TensorBoard in this process, all others in processes of their own."""

import importlib.util
import json
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from mssr.config.schema import LogConfig
from mssr.errors import UserError
from mssr.extras import what_to_install
from mssr.observe.metrics import Metric, scalars_of
from mssr.observe.rollouts import read_rollouts
from mssr.observe.trackers.apart import Apart
from mssr.observe.trackers.base import ExperimentTracker, Start, table
from mssr.observe.trackers.tensorboard import Tracker as TensorBoard
from mssr.outputs import replace

IDS = "trackers.json"  # in the run's folder: the id of the run in each tracker
HERE = "tensorboard"


def outputs(names: list[str]) -> tuple[list[str], list[str]]:
    """Return the names in run_dir of the files that a run with these trackers replaces, and of the folders it writes into."""
    return [IDS] if set(names) - {HERE} else [], names


def require_installed(names: list[str]) -> None:
    """Refuse a tracker whose library is missing.

    Raises:
        UserError: says what to install.
    """
    for name in names:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a folder of that name is no library
            raise UserError(f"log.trackers {name}: {what_to_install(name)}")


class Trackers(AbstractContextManager):
    """Passes on what a run records. Enter it on rank 0 only.

    first_step: of the metrics that come; 0: a new run, for which the trackers start new ones.
    places: where to look at the run in each tracker.

    Raises:
        UserError: a tracker cannot be started, or TensorBoard's files cannot be written.
    """

    def __init__(self, run_dir: Path, settings: LogConfig, config: dict[str, Any], first_step: int) -> None:
        run_dir = run_dir.resolve()
        self._step = first_step
        self._open: dict[str, ExperimentTracker] = {}
        known = _read(run_dir / IDS) if first_step else {}
        try:
            for name in settings.trackers:
                folder = run_dir / name
                folder.mkdir(exist_ok=True)
                start = Start(
                    folder, settings.project, settings.name or run_dir.name, config, first_step, known.get(name)
                )
                self._open[name] = TensorBoard(start) if name == HERE else Apart(name, start)
            apart = {name: tracker for name, tracker in self._open.items() if isinstance(tracker, Apart)}
            if apart:
                print(f"mssr: starting {', '.join(apart)}", flush=True)
            for name, tracker in apart.items():
                tracker.wait_until_ready()
                print(f"mssr: {name}: {tracker.place}", flush=True)
            self.places = {name: tracker.place for name, tracker in self._open.items()}
            ids = known | {name: tracker.id for name, tracker in apart.items()}
            if ids != known:
                replace(run_dir, IDS, lambda partial: partial.write_text(json.dumps(ids, indent=2) + "\n"))
        except BaseException as error:
            self.__exit__(type(error))
            raise

    def scalars(self, step: int, values: dict[str, Metric]) -> None:
        """Raises:
        UserError: TensorBoard's files cannot be written.
        """
        self._step = step
        self._each("scalars", step, scalars_of(values))

    def rollouts(self, step: int, folder: Path) -> None:
        """folder: of `save_rollouts`."""
        if self._open and (records := read_rollouts(folder.resolve())):
            self._each("rollouts", step, table(records))

    def curves(self, picture: Path) -> None:
        self._each("curves", self._step, picture.resolve())

    def _each(self, method: str, *arguments: Any) -> None:
        for name, tracker in list(self._open.items()):
            try:
                getattr(tracker, method)(*arguments)
            except OSError as error:  # also of earlier steps: a thread writes them
                del self._open[name]
                raise UserError(f"{tracker.place}: cannot be written: {error.strerror}") from error

    def __exit__(self, kind: type | None, *_) -> None:
        for tracker in self._open.values():
            try:
                tracker.close(ok=kind is None)
            except OSError as error:  # no reason to hide what ended the run, and metrics.jsonl has all
                print(
                    f"mssr: {tracker.place}: its last lines cannot be written: {error.strerror}",
                    file=sys.stderr,
                    flush=True,
                )
        for tracker in self._open.values():
            if isinstance(tracker, Apart):
                tracker.wait_until_closed()
        self._open = {}


def _read(path: Path) -> dict[str, str]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError:
        raise UserError(f"{path}: not JSON; restore it, or remove it to start new runs in log.trackers") from None
