"""Version numbers that can be compared."""

import re


def release(version: str) -> tuple[int, ...]:
    """(2, 13, 0) of "2.13.0+cpu" or "2.13.0rc1"; (0,) of what does not begin with a number."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else (0,)
