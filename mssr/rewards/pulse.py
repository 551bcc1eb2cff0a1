"""What a worker is doing and since when: shared memory, which the trainer reads also when the worker hangs."""

import mmap
import struct
import time

_STATE = struct.Struct("d"), struct.Struct("q")  # time, job


class Pulse:
    """One job at a time: its number, and since when; 0: none. Times are `time.monotonic`, the same in all processes."""

    SIZE = 16

    def __init__(self, file: int) -> None:
        """file: descriptor of a file of SIZE bytes."""
        self._memory = mmap.mmap(file, self.SIZE)

    def detach(self) -> None:
        """Keep what comes from the others: this is a child of the process."""
        self._memory = bytearray(self.SIZE)

    def begin(self, job: int) -> None:
        _STATE[0].pack_into(self._memory, 0, time.monotonic())  # before the job, or it might look late
        _STATE[1].pack_into(self._memory, 8, job)

    def read(self) -> tuple[int, float]:
        """Return the job and since when it runs."""
        (job,) = _STATE[1].unpack_from(self._memory, 8)
        return job, _STATE[0].unpack_from(self._memory, 0)[0]
