"""Preparing prompts ahead: each once, within the cache's size, errors raised by the step that needs the row."""

import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest
import torch

from mssr.batch import Prompt
from mssr.data.cache import PromptCache
from mssr.data.pixels import pixel_table
from mssr.data.prefetch import PromptLoader, worker_count

SIZE = 1000  # bytes per prompt


class Source:
    """Prepares rows and records which ones. Workers wait while `gate` is not set."""

    def __init__(self) -> None:
        self.prepared: list[int] = []
        self.broken: set[int] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.started = threading.Semaphore(0)

    def __call__(self, row: int) -> Prompt:
        self.prepared.append(row)
        self.started.release()
        assert self.gate.wait(30)
        if row in self.broken:
            raise ValueError(f"row {row}")
        return prompt(row)


def prompt(row: int, pixels=None) -> Prompt:
    return Prompt(str(row), row, "?", "1", None, torch.full((115,), row), pixels, None, (bytes(SIZE - 115 * 8),))


@pytest.fixture
def source():
    return Source()


@pytest.fixture
def make_loader(source):
    loaders = []

    def make(room: int = 100):
        loaders.append(PromptLoader(source, PromptCache(room * SIZE, None)))
        return loaders[-1]

    yield make
    source.gate.set()
    for loader in loaders:
        loader.close()


def settle(loader: PromptLoader) -> None:
    """Wait until all that was begun is done, as `close` does, but keep the loader open."""
    for future in loader._waiting:
        future.exception()


def test_what_was_begun_is_not_prepared_again(source, make_loader):
    loader = make_loader()
    loader.begin([3, 1, 4, 1, 5])
    settle(loader)
    assert sorted(source.prepared) == [1, 3, 4, 5]
    assert [one.row for one in loader.load([3, 1, 4, 1, 5])] == [3, 1, 4, 1, 5]
    assert len(source.prepared) == 4


def test_load_alone_keeps_the_order(source, make_loader):
    loader = make_loader()
    assert [one.row for one in loader.load([9, 2, 9, 7])] == [9, 2, 9, 7]
    assert sorted(source.prepared) == [2, 7, 9]
    assert loader.load([]) == []


def test_beginning_returns_at_once_and_load_waits_for_the_thread_that_is_at_it(source, make_loader):
    loader = make_loader()
    source.gate.clear()
    loader.begin([1])
    source.started.acquire()
    with ThreadPoolExecutor(3) as others:
        waiting = [others.submit(loader.get, 1) for _ in range(3)]
        source.gate.set()
        assert [future.result().row for future in waiting] == [1, 1, 1]
    assert source.prepared == [1]


def test_many_threads_prepare_each_row_once(source, make_loader):
    loader = make_loader()
    loader.begin(range(20))
    with ThreadPoolExecutor(8) as others:
        asked = list(others.map(loader.get, [row for row in range(50) for _ in range(8)]))
    assert [one.row for one in asked] == [row for row in range(50) for _ in range(8)]
    assert sorted(source.prepared) == list(range(50))


def test_a_row_that_gets_there_in_between_is_not_prepared_again(source):
    """Another thread finishes the row between the cache lookup and the decision to prepare it."""

    class Cache(PromptCache):
        between = None

        def get(self, row):
            found = super().get(row)
            if found is None and self.between is not None:
                between, self.between = self.between, None
                between(row)
            return found

    cache = Cache(10 * SIZE, None)
    loader = PromptLoader(source, cache)
    cache.between = loader.get
    assert loader.get(1).row == 1
    assert source.prepared == [1]


def test_no_more_is_prepared_ahead_than_fits(source, make_loader):
    loader = make_loader(room=5)
    loader.load([90, 91, 92])
    source.prepared.clear()
    loader.begin(range(40))
    settle(loader)
    ahead = len(source.prepared)
    assert 5 <= ahead <= 5 + worker_count()  # each thread may prepare one row that does not fit
    source.prepared.clear()
    assert [one.row for one in loader.load(range(40))] == list(range(40))
    assert len(source.prepared) == 35  # five were still in the cache
    assert set(range(5 + worker_count(), 40)) <= set(source.prepared)


def test_nothing_is_prepared_ahead_without_a_cache(source, make_loader):
    loader = make_loader(room=0)
    loader.begin([1, 2])
    settle(loader)
    assert source.prepared == []
    assert [one.row for one in loader.load([1, 2])] == [1, 2]


def test_a_broken_row_is_an_error_of_its_own_step(source, make_loader):
    loader = make_loader()
    source.broken = {2}
    loader.begin([1, 2, 3])
    settle(loader)
    assert [one.row for one in loader.load([1, 3])] == [1, 3]
    with pytest.raises(ValueError, match="row 2"):
        loader.load([3, 2, 1])
    source.broken.clear()
    assert loader.load([2])[0].row == 2


def test_the_first_broken_row_is_the_one_that_is_named(source, make_loader):
    loader = make_loader()
    source.broken = {5, 6, 7}
    for _ in range(5):
        with pytest.raises(ValueError, match="row 6"):
            loader.load([1, 6, 7, 5])


def test_a_new_step_drops_what_was_not_started(source, make_loader):
    loader = make_loader()
    source.gate.clear()
    loader.begin(range(100))
    source.started.acquire()
    loader.begin([200])
    source.gate.set()
    settle(loader)
    loader.close()
    assert 200 in source.prepared and len(source.prepared) <= 2 * worker_count() + 1


def test_closing_leaves_no_thread_and_starts_no_more_rows(source, make_loader):
    before = set(threading.enumerate())
    loader = make_loader()
    source.gate.clear()
    loader.begin(range(100))
    source.started.acquire()
    last = loader._waiting[-1]
    closing = threading.Thread(target=loader.close)
    closing.start()
    with pytest.raises(CancelledError):
        last.result(30)
    source.gate.set()
    closing.join()
    assert set(threading.enumerate()) <= before
    assert len(source.prepared) <= worker_count()


def test_closing_after_an_error_leaves_no_thread(source, make_loader):
    before = set(threading.enumerate())
    loader = make_loader()
    source.broken = {1}
    with pytest.raises(ValueError, match="row 1"):
        loader.load([0, 1, 2])
    loader.close()
    assert set(threading.enumerate()) <= before


def test_reserved_rows_outlast_others(source):
    cache = PromptCache(3 * SIZE, None)
    cache.reserve([1, 2])
    for row in (1, 7, 2, 8, 9):
        cache.put(row, prompt(row))
    assert [row for row in (1, 2, 7, 8, 9) if row in cache] == [1, 2, 9] and cache.nbytes == 3 * SIZE
    cache.reserve([9])
    cache.put(3, prompt(3))
    cache.put(4, prompt(4))
    assert [row for row in (1, 2, 3, 4, 9) if row in cache] == [3, 4, 9] and cache.nbytes == 3 * SIZE


def test_the_cache_keeps_the_last_used_within_its_bytes():
    cache = PromptCache(2 * SIZE + SIZE // 2, None)
    for row in (1, 2):
        cache.put(row, prompt(row))
    assert cache.get(1).row == 1
    cache.put(3, prompt(3))
    assert cache.get(2) is None and 1 in cache and 3 in cache
    small = PromptCache(SIZE - 1, None)
    small.put(1, prompt(1))
    assert 1 not in small and small.nbytes == 0


def test_pixels_that_cannot_be_packed_are_kept_as_they_are(image_processor):
    pixels = torch.randn(4, 1176)
    cache = PromptCache(10**6, pixel_table(image_processor))
    cache.put(1, prompt(1, pixels))
    assert torch.equal(cache.get(1).pixel_values, pixels)
    assert cache.nbytes == SIZE + pixels.nbytes
