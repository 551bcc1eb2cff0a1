"""Fixtures of the tests of rewards."""

import pytest


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    log = tmp_path_factory.mktemp("run") / "reward.log"
    log.touch()
    return log
