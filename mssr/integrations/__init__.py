"""Our loss inside other trainers. Each module is for one of them, and is imported by whoever has it installed."""

from mssr.integrations.versions import require_version

__all__ = ["require_version"]
