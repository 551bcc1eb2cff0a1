"""What a worker is doing and since when: shared memory, which the trainer reads also when the worker hangs."""

import mmap
import time


class Pulse:
    """One job at a time: its number, and since when; 0: none. Times are `time.monotonic`, the same in all processes."""

    SIZE = 16

    def __init__(self, file: int) -> None:
        """file: descriptor of a file of SIZE bytes."""
        # Each is stored at once: `struct` would clear it first, and the trainer might read that.
        self._state = memoryview(mmap.mmap(file, self.SIZE)).cast("d")

    def detach(self) -> None:
        """Keep what comes from the others: this is a child of the process."""
        self._state = memoryview(bytearray(self.SIZE)).cast("d")

    def begin(self, job: int) -> None:
        self._state[0] = time.monotonic()  # before the job, or that might look late
        self._state[1] = job

    def read(self) -> tuple[int, float]:
        """Return the job and since when it runs."""
        job = int(self._state[1])
        return job, self._state[0]
