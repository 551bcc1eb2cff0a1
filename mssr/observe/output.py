"""Keeps a run going when nobody can read its output any more.

Ctrl-C in `mssr train ... | tee log` ends tee first, and the next line would end the run before it has saved its step. So
would a line to a terminal that is gone, or to a log on a full disk.
"""

import os
import sys
from typing import Any


def outlive_readers() -> None:
    """Drop what the standard streams cannot write, until the process ends."""
    nowhere = open(os.devnull, "w")  # noqa: SIM115  for a stream that is None: it was closed at the start (`>&-`)
    sys.stdout, sys.stderr = _Lossy(sys.stdout or nowhere), _Lossy(sys.stderr or nowhere)


class _Lossy:
    """A text stream that drops what it cannot write."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, act: Any, *arguments: str) -> None:
        try:
            act(*arguments)
        except BrokenPipeError:  # else what is buffered would fail again when the process ends
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
        except OSError:
            pass
