"""What every test session sets before torch is imported, and `mssr` commands on tiny real material."""

import gc
import os

# Read by OpenMP when it loads: with one thread a process, tests that start ranks do not fight over the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined
# Triton's interpreter multiplies with numpy. OpenBLAS' kernels for Haswell and Zen round a row differently when it stands
# elsewhere in the matrix, which tests of bitwise equality see; those for Sandy Bridge do not, and run wherever there is AVX.
os.environ["OPENBLAS_CORETYPE"] = "Sandybridge"

import pytest
import torch
from failures import pytest_terminal_summary  # noqa: F401
from families import pytest_collection_modifyitems, pytest_xdist_make_scheduler  # noqa: F401
from mssr_process import Launcher
from two_ranks import two_ranks


def pytest_collection_finish():
    """Exempt what is imported by now from garbage collection: DeepSpeed collects dozens of times, half a second each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def material(tmp_path_factory):
    """A folder with 64 training and 32 validation problems (digits), a tiny random Qwen2.5-VL and config.yaml."""
    from material import write_material

    return write_material(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="session")
def mssr(material, tmp_path_factory):
    """Starts `mssr` commands: `mssr("train", config, "train.steps=2")` runs one and returns how it ended."""
    with Launcher(tmp_path_factory.mktemp("commands"), material / "untrained") as launcher:
        yield launcher


@pytest.fixture(scope="session")
def warm(mssr, material):
    """`material` whose config.yaml starts from a policy that answers in format and is sometimes right."""
    config = material / "config.yaml"
    mssr("sft", config, f"run_dir={material / 'sft'}").check()
    changed = config.read_text().replace(str(material / "untrained"), str(material / "sft" / "model"))
    warm = material / "warm.yaml"
    warm.write_text(changed)
    return warm


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Two gloo ranks: `ranks(function, ...)` runs `function(world, ...)` on both and returns the results in rank order."""
    # Where `policy_helpers` keeps its models: the ranks, which only read, must look where this process writes.
    os.environ.setdefault("MSSR_TEST_POLICY_WORKSPACE", str(tmp_path_factory.mktemp("policy")))
    return two_ranks()


@pytest.fixture
def compiled_anew():
    """For what compiles in processes of its own when it is not tested: nothing that other tests compiled is there."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=False):
        yield
    torch._dynamo.reset()
