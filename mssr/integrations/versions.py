"""Which versions of the other trainers an integration was made for: it hangs on what they do inside."""

import importlib.metadata

from mssr.errors import UserError
from mssr.release import release

SUPPORTED = {  # package: the first version, and the first that is not
    "trl": ("1.15", "1.17"),
    "verl": ("0.9.1", "0.10"),
    "openrlhf": ("0.11.2", "0.12"),
}


def require_version(package: str) -> str:
    """The installed version of `package`.

    Raises:
        UserError: it is not installed, or not of the versions that its integration was made for.
    """
    low, high = SUPPORTED[package]
    wanted = f"mssr.integrations.{package} needs {package}>={low},<{high}"
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"{wanted}: it is not installed; pip install '{package}>={low},<{high}'") from None
    if not release(low) <= release(version) < release(high):
        raise UserError(f"{wanted}, this is {version}; pip install '{package}>={low},<{high}'")
    return version
