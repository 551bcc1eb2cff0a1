"""Tests that need a CUDA device and compiled kernels; elsewhere nothing is collected. `make gpu` runs them.

That command does not load tests/conftest.py, which interprets the kernels and imports the trainer's libraries.
"""

import sys
from pathlib import Path

import pytest
import torch

# For `import gpu_oracle` and `import gpu_problems`.
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
    """Empty the allocator's cache after each test, so that the next one can use all memory."""
    yield
    torch.cuda.empty_cache()
