"""Checks that a framework is the one an integration was written for: integrations depend on its internals."""

import importlib.metadata
import inspect
from collections.abc import Callable

from mssr.errors import UserError
from mssr.versions import is_supported, requirement


def require_version(package: str) -> str:
    """Return the installed version of `package`.

    Raises:
        UserError: it is not installed, or its version is not supported.
    """
    wanted = f"mssr.integrations.{package} needs {requirement(package)}"
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"{wanted}: it is not installed; pip install '{requirement(package)}'") from None
    if not is_supported(package, version):
        raise UserError(f"{wanted}, this is {version}; pip install '{requirement(package)}'")
    return version


def require_parameters(framework: str, function: Callable, expected: list[str]) -> None:
    """Check the names of a function's parameters. framework: name and version, for the message.

    Raises:
        UserError: they are others.
    """
    found = list(inspect.signature(function).parameters)
    if found != expected:
        raise UserError(
            f"{framework}: {function.__qualname__} takes ({', '.join(found)}), not ({', '.join(expected)}): "
            "this version is not supported, see docs/INTEGRATIONS.md"
        )
