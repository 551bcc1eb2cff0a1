"""One line instead of a traceback where a library of an extra is not installed. Entry points import this module first."""

import sys

from mssr.versions import extra_of

_PACKAGES = {
    "PIL": "pillow",
    "yaml": "pyyaml",
    "sklearn": "scikit-learn",
    "mlflow": "mlflow-skinny",
}  # import name -> distribution, where they differ
_previous = sys.excepthook


def what_to_install(module: str) -> str | None:
    """Return the line for a module of an extra that is not installed; None for another module."""
    package = _PACKAGES.get(module, module.replace("_", "-"))
    extra = extra_of(package)
    if extra is None:
        return None
    return f"{package} is not installed; it is in the extra `{extra}`: in the checkout, pip install -e '.[{extra}]'"


def _one_line(kind, error, trace) -> None:
    line = what_to_install(error.name) if isinstance(error, ModuleNotFoundError) and error.name else None
    if line is None:
        return _previous(kind, error, trace)
    print(f"mssr: {line}", file=sys.stderr)
    sys.exit(2)


sys.excepthook = _one_line
