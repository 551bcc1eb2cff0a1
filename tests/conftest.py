"""Environment variables that must be set before torch is imported, and the fixtures of all tests."""

import gc
import os
import signal

# Read by OpenMP when it loads: with one thread per process, tests that start ranks do not compete for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined
# Triton's interpreter multiplies with NumPy. OpenBLAS kernels for Haswell and Zen round a row differently depending on its
# position in the matrix, which breaks tests of bitwise equality. Those for Sandy Bridge do not, and run on any CPU with AVX.
os.environ["OPENBLAS_CORETYPE"] = "Sandybridge"

import pytest
import torch
from failures import pytest_terminal_summary  # noqa: F401
from families import pytest_collection_modifyitems, pytest_xdist_make_scheduler  # noqa: F401
from mssr_process import Launcher
from two_ranks import two_ranks


def pytest_configure():
    """Obey Ctrl-C: a shell's background job ignores it, and the processes that tests start would inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish():
    """Exempt everything imported so far from garbage collection: DeepSpeed collects dozens of times, half a second each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def material(tmp_path_factory):
    """Return a folder with 64 training and 32 validation problems (digits), a tiny random Qwen2.5-VL and config.yaml."""
    from material import write_material

    return write_material(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="session")
def mssr(material, tmp_path_factory):
    """Run `mssr` commands: `mssr("train", config, "train.steps=2")` runs one and returns an `Ended`."""
    with Launcher(tmp_path_factory.mktemp("commands"), material / "untrained") as launcher:
        yield launcher


@pytest.fixture(scope="session")
def warm(mssr, material):
    """Return a config like that of `material`, with a warm-started policy that answers in format and is sometimes right."""
    config = material / "config.yaml"
    mssr("sft", config, f"run_dir={material / 'sft'}").check()
    changed = config.read_text().replace(str(material / "untrained"), str(material / "sft" / "model"))
    warm = material / "warm.yaml"
    warm.write_text(changed)
    return warm


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Two gloo ranks: `ranks(function, ...)` runs `function(world, ...)` on both and returns the results in rank order."""
    # `policy_helpers` keeps its models here: this process writes them, the ranks only read them.
    os.environ.setdefault("MSSR_TEST_POLICY_WORKSPACE", str(tmp_path_factory.mktemp("policy")))
    return two_ranks()


@pytest.fixture
def compiled_anew():
    """Reset torch.compile before and after the test, for code that normally compiles in a fresh process."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=False):
        yield
    torch._dynamo.reset()
