"""YAML 1.2's scalars, in files and in overrides: `on` and `no` are text, 1e3 is a number, 010 is ten, dates are text.

PyYAML reads YAML 1.1, where `liger: on` is true and `lr: 1e-6` is text.
"""

import re
from typing import Any, ClassVar

import yaml

_INT = "tag:yaml.org,2002:int"
_SCALARS = {
    "tag:yaml.org,2002:null": r"~|null|Null|NULL|",
    "tag:yaml.org,2002:bool": r"true|True|TRUE|false|False|FALSE",
    _INT: r"[-+]?[0-9]+(_[0-9]+)*",
    "tag:yaml.org,2002:float": r"[-+]?(\.[0-9]+|[0-9]+(_[0-9]+)*(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    "tag:yaml.org,2002:merge": r"<<",
}


class _Loader(yaml.SafeLoader):
    """Also refuses a duplicate key, of which YAML would silently take the last value."""

    yaml_implicit_resolvers: ClassVar = {}  # instead of those of YAML 1.1

    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value]
        for name in names:
            if names.count(name) > 1 and name != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"{name} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would not read as text."""


for tag, pattern in _SCALARS.items():
    for kind in (_Loader, _Dumper):
        kind.add_implicit_resolver(tag, re.compile(f"(?:{pattern})$"), None)
_Loader.add_constructor(_INT, lambda loader, node: int(loader.construct_scalar(node)))  # 010 is no octal


def load(text: str) -> Any:
    """Raises:
    yaml.YAMLError: not YAML, or a duplicate key.
    """
    return yaml.load(text, _Loader)


def dump(values: Any, **options: Any) -> str:
    return yaml.dump(values, Dumper=_Dumper, **options)
