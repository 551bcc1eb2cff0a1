"""The starting point of RL on handwritten digits: problems, a tiny Qwen2.5-VL, and its warm start by `mssr sft`.

    digits -> a tiny random Qwen2.5-VL -> `mssr sft`, up to sft.stop_at_accuracy

The demo trains one; a study trains one per seed, which all of its arms start from.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from examples.digits.problems import MOST_DIGITS, write_digits
from examples.tiny import start as tiny
from mssr.config import Config, load_config
from mssr.config.section import Section
from mssr.errors import UserError
from mssr.outputs import set_aside

MARKER = "digits_start.json"
_SPLITS = ("train", "val", "test")


class DigitsSettings(Section):
    """Settings of the task, and the size of the model."""

    digits: int = Field(2, ge=2, le=MOST_DIGITS, description="digits per image; 3 and more: a chain of operations")
    train: int = Field(4096, gt=0, description="training problems; each split has its own scans")
    val: int = Field(512, gt=0)
    test: int = Field(512, gt=0)
    hidden: int = Field(128, gt=0, multiple_of=64, description="width of the model")
    layers: int = Field(2, gt=0)
    vision_layers: int = Field(2, gt=0)


@dataclass(frozen=True)
class DigitsStart:
    """model: the policy that RL starts from. train, val, test: files of problems."""

    model: Path
    train: Path
    val: Path
    test: Path

    @property
    def overrides(self) -> list[str]:
        """Overrides of a run on it."""
        return [f"model.path={self.model}", f"data.train={self.train}", f"data.val={self.val}"]


def digits_start(
    folder: Path,
    config_file: Path,
    seed: int,
    overrides: Sequence[str] = (),
    settings: DigitsSettings = DigitsSettings(),
) -> DigitsStart:
    """Return the finished start of this seed in `folder`, or make one; parts of an unfinished one are set aside.

    overrides: `key=value` for the warm start. It runs on one rank; its output goes to `folder/sft.log`.

    Raises:
        UserError: the start there has other settings, the folder holds other files, or the warm start failed.
    """
    folder = Path(folder)
    files = {split: folder / "data" / f"{split}.parquet" for split in _SPLITS}
    start = DigitsStart(folder / "sft" / "model", **files)
    config = load_config(config_file, _warm_start_overrides(folder, files, seed, overrides))
    made_from = _made_from(config, settings)
    earlier = _read_marker(folder)
    if earlier["finished"]:
        _refuse_other_settings(folder, earlier["made_from"], made_from)
        return start

    for name in ("data", "untrained", "sft"):
        set_aside(folder / name)
    _write_marker(folder, finished=False, made_from=made_from)
    write_problems(folder, seed, settings)
    warm_start(folder, config_file, files, seed, overrides, settings, log=folder / "sft.log")
    _write_marker(folder, finished=True, made_from=made_from)
    return start


def write_problems(folder: Path, seed: int, settings: DigitsSettings = DigitsSettings()) -> dict[str, Path]:
    """Write `folder/data`; return the file of each split."""
    counts = {split: getattr(settings, split) for split in _SPLITS}
    return write_digits(folder / "data", seed=seed, digits=settings.digits, **counts)


def warm_start(
    folder: Path,
    config_file: Path,
    files: Mapping[str, Path],
    seed: int,
    overrides: Sequence[str] = (),
    settings: DigitsSettings = DigitsSettings(),
    *,
    ranks: int = 1,
    log: Path | None = None,
) -> Path:
    """Write a tiny random model, `folder/untrained`, and train it; return `folder/sft/model`.

    files: from `write_problems`. log: file for the output of `mssr sft`; None: this process's output.
    """
    sizes = {name: getattr(settings, name) for name in ("hidden", "layers", "vision_layers")}
    overrides = _warm_start_overrides(folder, files, seed, overrides)
    return tiny.warm_start(folder, config_file, overrides, ranks=ranks, log=log, **sizes)


def _warm_start_overrides(folder: Path, files: Mapping[str, Path], seed: int, overrides: Sequence[str]) -> list[str]:
    data = [f"seed={seed}", f"data.train={files['train']}", f"data.val={files['val']}"]
    return tiny.warm_start_overrides(folder, [*data, *overrides])


def _made_from(config: Config, settings: DigitsSettings) -> dict[str, Any]:
    """Return the settings that determine a start, by key; without paths, so that a folder can be moved."""
    parts = {
        "seed": True,
        "data": {"instruction", "max_prompt_tokens", "min_pixels", "max_pixels"},
        "sft": True,
        "eval": {"temperature", "max_problems"},
    }
    dumped = config.model_dump(mode="json", include=parts) | {"start": settings.model_dump()}
    keys: dict[str, Any] = {}
    for name, value in dumped.items():
        keys |= {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
    return keys


def _refuse_other_settings(folder: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    for key in sorted(there.keys() | here.keys()):
        if there.get(key) != here.get(key):
            raise UserError(
                f"{folder}: its warm start was made with {key} {there.get(key)}, this run has {here.get(key)}; "
                "remove the folder, or choose another one"
            )


def _read_marker(folder: Path) -> dict[str, Any]:
    """Read the state of the start in `folder`.

    Raises:
        UserError: the folder holds other files, or the marker is damaged.
    """
    marker = folder / MARKER
    if marker.is_file():
        try:
            state = json.loads(marker.read_text())
        except ValueError:
            state = None
        if not isinstance(state, dict) or "finished" not in state:
            raise UserError(f"{marker}: damaged; remove it and the rest of {folder}, or choose another folder")
        return state
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} exists and is not a warm start; choose another folder")
    return {"finished": False}


def _write_marker(folder: Path, **state: Any) -> None:
    """Write the marker atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{MARKER}"
    partial.write_text(json.dumps(state, indent=2) + "\n")
    os.replace(partial, folder / MARKER)
