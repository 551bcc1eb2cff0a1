"""These tests need a CUDA device and compiled kernels: anywhere else the folder collects nothing. `make gpu` runs them.

That command keeps tests/conftest.py out (it interprets the kernels, and imports the trainer's libraries).
"""

import sys
from pathlib import Path

import pytest
import torch

# `gpu_oracle` and `gpu_problems` are imported by their names.
sys.path.insert(0, str(Path(__file__).parent))


def _compiled() -> bool:
    try:
        import triton
    except ImportError:
        return False
    return torch.cuda.is_available() and not triton.knobs.runtime.interpret


collect_ignore_glob = [] if _compiled() else ["test_*.py"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(1234)


@pytest.fixture(autouse=True)
def _memory():
    """What a test leaves in the allocator's cache is not there for the next one to trip over."""
    yield
    torch.cuda.empty_cache()
