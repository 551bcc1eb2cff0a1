import os
import sys
from contextlib import suppress

import pytest

from mssr.observe.output import outlive_readers
from mssr.observe.progress import Activity


def no_reader():
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def full_disk():
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.parametrize("place", [no_reader, full_disk])
def test_what_cannot_be_written_is_dropped(place, monkeypatch):
    stream = os.fdopen(place(), "w")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    outlive_readers()
    for _ in range(3):
        print("x" * 100_000, flush=True)
        print("y", file=sys.stderr, flush=True)
    assert not sys.stdout.isatty()
    with suppress(OSError):
        stream.close()


def test_a_stream_that_was_closed_at_the_start(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    outlive_readers()
    Activity().say("loading")
    print("mssr: SIGTERM", file=sys.stderr, flush=True)
