"""Fixtures shared by the tests of the policy and of the rollouts."""

import os

import policy_helpers
import pytest
import torch

from mssr.distributed import start_world
from mssr.policy.loading import load_policy


@pytest.fixture(scope="module")
def world():
    """A process group of one rank. The environment variables of a launcher are set only meanwhile."""
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    with pytest.MonkeyPatch.context() as patch:
        launched = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        for name, value in launched.items():
            patch.setenv(name, value)
        yield start_world("cpu")


@pytest.fixture(scope="session")
def model_dir() -> str:
    return policy_helpers.model_dir()


@pytest.fixture(scope="session")
def prompts():
    return policy_helpers.prompts()


@pytest.fixture(scope="session")
def plain(model_dir):
    """The oracle's model in plain transformers; never trained."""
    return policy_helpers.plain_model(model_dir).requires_grad_(False)


@pytest.fixture(scope="session")
def policy(model_dir):
    """The same weights, loaded as the trainer does; never trained."""
    return load_policy(model_dir, torch.float32)
