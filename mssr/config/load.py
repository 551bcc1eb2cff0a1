"""Reads a YAML file and `key=value` overrides into a validated `Config`:

    mssr train configs/tiny.yaml train.optimizer.lr=1e-4 algorithm.name=mvsr

An unknown key is refused with the nearest known one.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mssr.config import yaml_1_2
from mssr.config.conflicts import refuse_conflicts
from mssr.config.deepspeed_json import with_stage_of_json
from mssr.config.nearest import nearest_key
from mssr.config.presets import with_preset
from mssr.config.schema import Config
from mssr.errors import UserError


def load_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] | None = None) -> Config:
    """Read a YAML file, or take a dict of the same form; apply `key=value` overrides; validate.

    Raises:
        UserError: file missing or not YAML, duplicate or unknown key (names the nearest), value of the wrong type or range.
    """
    given = isinstance(source, Mapping)
    values = copy.deepcopy(dict(source)) if given else read_keys(Path(source), "config")
    for override in overrides or ():
        apply_override(values, override)
    return validate_config(values, source="config" if given else str(source))


def validate_config(values: dict[str, Any], source: str = "config") -> Config:
    """Validate a dict of values; reads the DeepSpeed JSON that it names."""
    try:
        config = Config.model_validate(with_stage_of_json(with_preset(values)))
        refuse_conflicts(config)
    except ValidationError as error:
        raise UserError(f"{source}: {_first_problem(error)}") from None
    except ValueError as conflict:
        raise UserError(f"{source}: {conflict}") from None
    return config


def _first_problem(error: ValidationError) -> str:
    """Describe one problem in a line, an unknown key first."""
    problems = error.errors()
    first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
    key, given = ".".join(str(part) for part in first["loc"]), first["input"]
    if first["type"] == "extra_forbidden":
        while isinstance(given, dict) and given:  # an unknown section, as in worker.rollout.n: its first key says more
            part, given = next(iter(given.items()))
            key = f"{key}.{part}"
        nearest = nearest_key(key)
        if nearest == key:  # `train.steps: 3`
            nested = key.replace(".", ": {") + ": ..." + "}" * key.count(".")
            return f"{key}: in a file a section is not written with a dot; write {nested}"
        return f"unknown key {key}; did you mean {nearest}?"
    said = "" if first["type"] in ("missing", "value_error") else f", got {given!r}"
    if first["type"] in ("string_type", "path_type") and isinstance(given, bool | int | float):
        said += f'; write it in quotes, {key}: "...", on the command line {key}=\'"..."\''
    return f"{key + ': ' if key else ''}{first['msg'].removeprefix('Value error, ')}{said}"


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one `key=value` in the nested values; missing sections are added.

    Raises:
        UserError: not `key=value`, or a section on the way holds a value.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r}: expected key=value, for example train.steps=10")
    *sections, last = key.split(".")
    for section in sections:
        if values.get(section) is None:  # missing, or a section without keys in the file
            values[section] = {}
        values = values[section]
        if not isinstance(values, dict):
            raise UserError(f"override {override!r}: {section} holds a value, not a section")
    try:
        values[last] = _value(text)
    except yaml.YAMLError as error:
        reason = getattr(error, "problem", None) or error
        raise UserError(f"override {override!r}: the value is not valid YAML: {reason}; quote it") from None


def _value(text: str) -> Any:
    """Return the value of an override, in which ` #` is text: a shell has no comments there."""
    value = yaml_1_2.load(text) if text else ""
    if (value is None or isinstance(value, str)) and re.search(r"(^|\s)#", text) and text.lstrip()[0] not in "'\"":
        return text.strip()
    return value


def read_keys(path: Path, what: str) -> dict[str, Any]:
    """Return the file's top-level keys; an empty file has none. what: kind of file, for messages ("config").

    Raises:
        UserError: missing or unreadable, not YAML, a duplicate key, or no mapping at the top level.
    """
    try:
        values = yaml_1_2.load(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such {what} file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable {what} file: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected `key: value` lines at the top level, found {type(values).__name__}")
    return values
