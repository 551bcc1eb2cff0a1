"""Pools of the functions in behaviour.py, for the tests of reward workers."""

import time
from pathlib import Path

import pytest

from mssr.rewards.function import named
from mssr.rewards.pool import RewardPool
from mssr.rewards.row import Row

BEHAVIOUR = Path(__file__).with_name("behaviour.py")


ROW = Row("How many?", "3")


SETTINGS = dict(workers=1, timeout_s=1.0, memory_gib=1.0, batch_size=8, log=None)


def open_pool(function, **settings):
    return RewardPool(function, **SETTINGS | settings)


def function(name, **settings):
    return named(f"{BEHAVIOUR}:{name}", **settings)


def fixture_of(name, **settings):
    @pytest.fixture(scope="module")
    def pool(log):
        pool = open_pool(function(name), log=log, **settings)
        yield pool
        pool.close()

    return pool


def outcomes(pool, *responses):
    """Submit the responses at once; each is its row's answer too."""
    futures = [pool.submit(response, Row("", response)) for response in responses]
    return [future.result(60) for future in futures]


def as_a_batch(pool, tmp_path, *responses):
    """Submit the responses to a new pool while it makes its first call, so that they are its second one."""
    first = pool.submit("first", Row("", "first", columns={"go": str(tmp_path / "go")}))
    while not first.running():
        time.sleep(0.005)
    futures = [pool.submit(response, Row("", response)) for response in responses]
    (tmp_path / "go").touch()
    return futures


def outcome(pool, response):
    return outcomes(pool, response)[0]


def kinds(found):
    return [one.failure.kind if one.failure else None for one in found]


def line_of(statement):
    return 1 + [line.strip() for line in BEHAVIOUR.read_text().splitlines()].index(statement)
