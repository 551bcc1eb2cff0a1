"""`key=value` on the command line, over a file's values."""

from typing import Any

import yaml

from mssr.errors import UserError


def apply_override(values: dict[str, Any], override: str) -> None:
    """Sets the key in the nested values, and makes the sections on the way.

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
        values[last] = _scalar(text)
    except yaml.YAMLError as error:
        reason = getattr(error, "problem", None) or error
        raise UserError(f"override {override!r}: the value is not valid YAML: {reason}; quote it") from None


def _scalar(text: str) -> Any:
    value = yaml.safe_load(text) if text else ""
    if isinstance(value, str):  # YAML 1.1 reads 1e-6 as a string
        try:
            return float(value)
        except ValueError:
            return value
    return value
