"""Every kernel compiles for A100 and H100 with every entry of the tuning table; no GPU is needed.

The code has what the table promises: no register spills, tensor cores for every 16-bit product, and the widest copies
of operands.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SHARED_MEMORY = {8: 99 << 10, 9: 227 << 10}  # limit per program: of sm_86 and sm_89, of sm_90


@pytest.fixture(scope="module")
def kernels():
    """Return each kernel's use of the hardware, by name; the fields are those of `codegen.usage`."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parents[1] / "kernels"), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, here / "codegen.py"], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return {kernel["name"]: kernel for kernel in map(json.loads, run.stdout.splitlines())}


def test_everything_stays_in_registers(kernels):
    assert len(kernels) > 40
    assert {name: kernel for name, kernel in kernels.items() if kernel["stack"] or kernel["local"]} == {}


def test_shared_memory_fits(kernels):
    assert [name for name, kernel in kernels.items() if kernel["shared"] > SHARED_MEMORY[kernel["arch"]]] == []


def test_products_of_16_bits_run_on_tensor_cores(kernels):
    products = [kernel for kernel in kernels.values() if kernel["half_product"]]
    assert {kernel["arch"] for kernel in products} == {8, 9}
    for kernel in products:
        assert kernel["wgmma" if kernel["arch"] == 9 else "mma_sync"] > 0, kernel["name"]
    for kernel in kernels.values():
        if not kernel["half_product"]:  # float32 is exact: no tf32
            assert kernel["wgmma"] == kernel["mma_sync"] == 0, kernel["name"]


def test_operands_arrive_by_tma_or_by_wide_asynchronous_copies(kernels):
    for kernel in kernels.values():
        if kernel["half_product"] and kernel["aligned"]:
            assert kernel["bulk_copies" if kernel["arch"] == 9 else "wide_copies"] > 0, kernel["name"]


def test_storing_the_weights_does_not_change_the_order_of_a_sum(kernels):
    storing = [name for name in kernels if name.startswith("forward storing")]
    assert len(storing) >= 8
    for name in storing:
        sums = kernels[name]["sums"]
        assert len(sums) == 8 and sums == kernels[name.replace(" storing", "")]["sums"], name
