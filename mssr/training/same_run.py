"""What a resumed run must have in common with the run that saved the checkpoint, and what else has changed."""

import hashlib
import re
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from mssr.config import Config
from mssr.config.data_keys import written
from mssr.data.dataset import ProblemDataset
from mssr.errors import UserError, shortened

# Other values would make other prompts, or draw others in a step, so that neither tracker nor metrics would fit.
_PROMPTS = (
    "seed", "data.system_prompt", "data.template", "data.instruction", "data.min_pixels", "data.max_pixels",
)  # fmt: skip
FIXED = {
    "train": (*_PROMPTS, "data.drop_solved", "rollout.prompts_per_step", "rollout.responses_per_prompt"),
    "sft": (*_PROMPTS, "sft.batch_size"),
}
_BY_CONTENT = ("run_dir", "model.path", "data.train", "sft.data")  # a folder may have moved
_MODEL_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "*.safetensors",
    "pytorch_model*.bin",
)
_SAMPLES, _SAMPLE_BYTES = 16, 4096


class SameRun:
    """Identifies a run by its command, settings, initial model and data.

    command: train or sft.
    """

    def __init__(self, command: str, config: Config) -> None:
        self._command, self._config = command, config
        self._settings = flat_settings(config)
        if config.data.template:
            self._settings["data.template"] = Path(config.data.template).read_text(encoding="utf-8")
        # A folder may change while the run trains; a model of the hub does not, and need not have been loaded yet.
        folder = Path(config.model.path)
        self._model = model_fingerprint(str(folder)) if folder.is_dir() else None

    def trained_on(self, problems: ProblemDataset) -> str:
        """Return the fingerprint of what the command trains on: `mssr sft` also on the solutions."""
        solutions = problems.solutions_fingerprint if self._command == "sft" else ""
        return problems.fingerprint + solutions

    def state_dict(self, data: str) -> dict[str, Any]:
        """Return what a checkpoint keeps. data: of `trained_on`."""
        self._model = self._model or model_fingerprint(self._config.model.path)
        return {"command": self._command, "settings": self._settings, "model": self._model, "data": data}

    def refuse_other_settings(self, saved: dict[str, Any]) -> None:
        """Refuse a checkpoint of another run, before model and data are loaded.

        saved: `state_dict` in the checkpoint.

        Raises:
            UserError: the command or a fixed setting differs.
        """
        if saved["command"] != self._command:
            raise UserError(
                f"run_dir {self._config.run_dir} holds a run of `mssr {saved['command']}`; resume with that command, or "
                "set another run_dir"
            )
        for key in FIXED[self._command]:
            there, here = saved["settings"].get(key), self._settings.get(key)
            if there != here:
                here, there = shortened(repr(here), 300), shortened(repr(there), 300)
                raise UserError(
                    f"{key} is {here}, the checkpoint's run had {there}; resume with that, or set another run_dir"
                )

    def refuse_other_start(self, saved: dict[str, Any], data: str) -> None:
        """Refuse another initial model or other training data than the checkpoint's run had. Both must be loaded here.

        Raises:
            UserError: one of them differs.
        """
        here = self.state_dict(data)
        if saved["model"] != here["model"]:
            raise UserError(
                f"model.path {self._config.model.path} is not the model that the checkpoint's run started from "
                f"({saved['settings']['model.path']}); resume with that, or set another run_dir"
            )
        if saved["data"] != data:
            key = "sft.data" if self._command == "sft" and self._config.sft.data else "data.train"
            raise UserError(
                f"{key} {self._settings[key]} is not what the checkpoint was trained on; restore it, or set another run_dir"
            )

    def changes(self, saved: dict[str, Any]) -> list[str]:
        """Return the settings that differ and may: `train.steps 9 (was 6)`."""
        there, here = saved["settings"], self._settings
        keys = sorted((there.keys() | here.keys()) - set(_BY_CONTENT))
        return [f"{key} {here.get(key)!r} (was {there.get(key)!r})" for key in keys if there.get(key) != here.get(key)]


def flat_settings(config: Config) -> dict[str, Any]:
    """Return all settings by their dotted keys; files with weights are one text, another mapping by files stays as it is."""
    settings = config.model_dump(mode="json")
    for section, key in (("data", "train"), ("sft", "data")):
        sources = settings[section][key]
        settings[section][key] = sources and written(sources)
    return _flat(settings)


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for key, value in settings.items():
        nested = isinstance(value, dict) and all(re.fullmatch(r"[\w-]+", name) for name in value)
        found |= _flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return found


def model_fingerprint(path: str) -> str:
    """Return sha256 over samples of the files of a model directory or hub name, so that the directory may move.

    Reading all weights of a large model would take minutes.
    """
    digest = hashlib.sha256()
    folder = Path(cached_file(path, "config.json")).parent
    for file in sorted(file for pattern in _MODEL_FILES for file in folder.glob(pattern)):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as content:
            for sample in range(_SAMPLES):
                content.seek(size * sample // _SAMPLES)
                digest.update(content.read(_SAMPLE_BYTES))
    return digest.hexdigest()
