"""A run's configuration: `schema` defines the keys, `load` reads a file, `resolve` decides what "auto" stands for."""

from mssr.config.load import load_config, validate_config  # noqa: F401
from mssr.config.schema import Config  # noqa: F401
