"""YAML files that users write: a run's configuration, a study."""

from pathlib import Path
from typing import Any

import yaml

from mssr.errors import UserError


def read_keys(path: Path, what: str) -> dict[str, Any]:
    """The file's top-level keys; an empty file has none. what: its kind, for messages ("config").

    Raises:
        UserError: missing or unreadable, not YAML, a key twice, something else than keys at the top.
    """
    try:
        values = yaml.load(path.read_text(), _UniqueKeys)
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


class _UniqueKeys(yaml.SafeLoader):
    """YAML lets a later key replace an earlier one without a word."""

    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value]
        for name in names:
            if names.count(name) > 1 and name != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"{name} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)
