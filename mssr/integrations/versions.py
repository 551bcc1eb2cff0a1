"""Which versions of the other trainers an integration was made for: it hangs on what they do inside."""

import importlib.metadata

from mssr.errors import UserError
from mssr.versions import is_supported, requirement


def require_version(package: str) -> str:
    """The installed version of `package`.

    Raises:
        UserError: it is not installed, or not of the versions that its integration was made for.
    """
    wanted = f"mssr.integrations.{package} needs {requirement(package)}"
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"{wanted}: it is not installed; pip install '{requirement(package)}'") from None
    if not is_supported(package, version):
        raise UserError(f"{wanted}, this is {version}; pip install '{requirement(package)}'")
    return version
