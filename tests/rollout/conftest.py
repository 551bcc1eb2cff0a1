import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "policy"))

import policy_helpers
from policy_fixtures import *  # noqa: F403

from mssr.policy.loading import load_policy


@pytest.fixture
def own_policy():
    """A policy whose weights a test may change."""
    return load_policy(policy_helpers.model_dir(), torch.float32).requires_grad_(False)


@pytest.fixture(scope="module")
def many(prompts):
    """36 prompts with no, one or two images; far more than the servers handle at once."""
    return list(prompts) * 6
