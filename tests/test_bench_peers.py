"""The arguments that the peers of `bench.kernels` get, and that declared products are those that are executed."""

from itertools import pairwise

import pytest
import torch

from bench import cases, peers
from bench.inputs import Inputs
from bench.jobs import Settings
from bench.providers import PROVIDERS
from bench.shapes import Shape
from bench.work import executed_flops

pytestmark = pytest.mark.usefixtures("compiled_anew")
SHAPE = Shape(None, 64, 32, 2048, "float32", "realistic")
PRODUCT = 2 * SHAPE.n * SHAPE.d * SHAPE.v
# Run on a CPU and compile no products.
ON_CPU = [
    "eager", "mssr exact", "mssr recompute", "mssr forward", "liger GRPO", "liger scaled CE", "trl", "torch linear CE",
]  # fmt: skip


@pytest.mark.parametrize("name", ON_CPU)
def test_declared_products_are_those_that_are_executed(name):
    settings = Settings("cpu", workspace_mib=1)
    inputs = cases.make(SHAPE, settings, seed=0)
    for task in PROVIDERS[name].tasks:
        tensors = cases.for_task(inputs, task)
        made = executed_flops(lambda tensors=tensors, task=task: cases.run(tensors, name, task, settings))
        assert made / PRODUCT == getattr(PROVIDERS[name].products, task), task


def shapes_only(n: int, d: int, v: int, dtype: torch.dtype) -> Inputs:
    rows = torch.empty(n, device="meta")
    return Inputs(
        torch.empty(n, d, dtype=dtype, device="meta"), torch.empty(v, d, dtype=dtype, device="meta"), *3 * [rows], 0
    )


def test_chunk_sizes_of_peers_are_their_trainers_and_no_more_than_our_workspace():
    quick, settings = shapes_only(512, 256, 16384, torch.float32), Settings("cpu", workspace_mib=8)
    assert peers.trl_columns(quick, settings) * 512 * 4 == peers.verl_tokens(quick, settings) * 16384 * 4 == 8 << 20
    model, settings = shapes_only(8192, 3584, 152064, torch.bfloat16), Settings("cuda")
    assert (peers.trl_columns(model, settings), peers.verl_tokens(model, settings)) == (32768, 512)
    assert peers.trl_columns(shapes_only(64, 32, 2048, torch.float32), settings) == 2048  # the whole vocabulary


def test_chunks_of_liger_grpo_fill_its_tile():
    """A chunk of 8 sequences has 2,048 tokens, or one sequence where that is longer."""
    found = [peers.liger_sequences(shapes_only(n, 8, 8, torch.float32)) for n in (64, 512, 2048, 8192, 32768)]
    assert found == [256, 32, 8, 2, 1] and all(a >= b for a, b in pairwise(found))
