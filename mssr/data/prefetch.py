"""Prepares prompts in threads: a step's in parallel, and the next step's ahead of time.

Threads suffice, since decoding, resizing and pixel arithmetic release the interpreter lock. What is prepared ahead waits
in the cache: at most one step, and of it as many rows as fit. The rest is prepared on request.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event, Lock

from mssr.batch import Prompt
from mssr.data.cache import PromptCache

MOST_WORKERS = 8  # more would slow down the step, which runs in the same interpreter


def worker_count() -> int:
    """Return this process's share of the machine's cores, at most MOST_WORKERS."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_WORKERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


class PromptLoader:
    """Prepares the rows that the cache lacks, no row in two threads at once.

    prepare: row -> prompt, called from several threads.
    """

    def __init__(self, prepare: Callable[[int], Prompt], cache: PromptCache) -> None:
        self._prepare = prepare
        self._cache = cache
        self._workers = worker_count()
        self._threads = ThreadPoolExecutor(self._workers, thread_name_prefix="prompts")
        self._waiting: list[Future[None]] = []  # of the next step
        self._running: dict[int, Future[Prompt]] = {}
        self._lock = Lock()

    def load(self, rows: list[int]) -> list[Prompt]:
        """Return the prompts of these rows, in order. Cancels what was to be prepared ahead and has not started.

        Raises:
            what `prepare` raises for the first row that fails.
        """
        self._stop_ahead()
        once = list(dict.fromkeys(rows))
        prompts = [self.get(once[0])] if len(once) == 1 else self._threads.map(self.get, once)
        prompts = dict(zip(once, prompts))
        return [prompts[row] for row in rows]

    def get(self, row: int) -> Prompt:
        """Return one prompt: from the cache, from the thread that is preparing it, or prepared here."""
        while True:
            prompt = self._cache.get(row)
            if prompt is not None:
                return prompt
            with self._lock:
                running = self._running.get(row)
                mine = running is None and row not in self._cache  # another thread may just have put it there
                if mine:
                    running = self._running[row] = Future()
            if mine:
                return self._run(row, running)
            if running is not None:
                return running.result()

    def _run(self, row: int, running: Future[Prompt]) -> Prompt:
        try:
            prompt = self._prepare(row)
            self._cache.put(row, prompt)
        except BaseException as error:
            running.set_exception(error)
            raise
        else:
            running.set_result(prompt)
            return prompt
        finally:
            with self._lock:
                del self._running[row]

    def begin(self, rows: Iterable[int]) -> None:
        """Start to prepare these rows, in order, for the next `load`, and return at once.

        Does nothing if this process has one core, which the step needs.
        """
        self._stop_ahead()
        if not self._cache.capacity or self._workers == 1:
            return
        once = list(dict.fromkeys(rows))
        self._cache.reserve(once)
        full = Event()
        self._waiting = [self._threads.submit(self._get_ahead, row, full) for row in once if row not in self._cache]

    def _get_ahead(self, row: int, full: Event) -> None:
        if full.is_set():
            return
        try:
            self.get(row)
        except Exception:
            return  # raised again by `load`, in the step that needs the row
        if row not in self._cache:
            full.set()

    def _stop_ahead(self) -> None:
        for future in self._waiting:
            future.cancel()
        self._waiting = []

    def close(self) -> None:
        """Stop the threads; each finishes its current row."""
        self._threads.shutdown(cancel_futures=True)
