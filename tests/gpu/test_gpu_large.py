"""More than 2^31 logits: in total, in one chunk, in one slab. An int32 offset would overflow in the last rows."""

import pytest
import torch
from gpu_problems import DEVICE, learn, policy_rows, problem, random, score

from bench import inputs as realistic
from mssr_kernels import linear_logprob_entropy

N, D, V = 16384, 256, 152064
LAST = 64
# Enough for all rows to be one chunk.
WORKSPACE = {"triton": 8 << 30, "chunked": 18 << 30}
SPARSE_WORKSPACE = {"triton": 8 << 30, "chunked": 22 << 30}
DEVICE_BYTES = 75e9
# dz has 8 significant bits, and the last bit of the results may round either way.
CLOSE = 5e-3


@pytest.fixture(autouse=True)
def _room():
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[1] < DEVICE_BYTES:
        pytest.skip("needs a device with 80 GB")


def near(found, wanted, tolerance=CLOSE):
    return (found.float() - wanted.float()).norm() <= tolerance * wanted.float().norm()


@pytest.mark.parametrize("backend", ["triton", "chunked"])
def test_forward(backend):
    assert N * V > 2**31
    hidden, weight, target = problem(N, D, V)
    with torch.no_grad():
        whole = linear_logprob_entropy(hidden, weight, target, backend=backend)
        last = linear_logprob_entropy(hidden[-LAST:], weight, target[-LAST:], backend=backend)
    for value, wanted in zip(whole, last):
        if backend == "triton":
            assert torch.equal(value[-LAST:], wanted)
        torch.testing.assert_close(value[-LAST:], wanted, rtol=1e-4, atol=1e-4)  # the BLAS may sum in another order


@pytest.mark.parametrize("backend", ["triton", "chunked"])
def test_mode_exact_in_one_chunk(backend):
    inputs = problem(N, D, V)
    with torch.no_grad():
        rows = policy_rows(linear_logprob_entropy(*inputs, backend=backend).logp)
    options = dict(backend=backend, normalizer=N / 2)
    whole, gradients = learn(rows, *inputs, workspace_bytes=WORKSPACE[backend], **options)
    small, wanted = learn(rows, *inputs, **options)
    for value, other in zip(whole[1:5], small[1:5]):
        if backend == "triton":
            assert torch.equal(value, other)
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-4)
    for found, other in zip(gradients[:2], wanted[:2]):
        assert near(found, other) and near(found[-LAST:], other[-LAST:], 2 * CLOSE)
    last_rows = {name: value[-LAST:] for name, value in rows.items()}
    _, last = learn(last_rows, inputs[0][-LAST:], inputs[1], inputs[2][-LAST:], **options)
    assert near(gradients[0][-LAST:], last[0])


@pytest.mark.parametrize("backend", ["triton", "chunked"])
def test_mode_sparse_in_one_chunk(backend):
    data = realistic.make(N, D, V, torch.bfloat16, DEVICE, "peaked")
    inputs = [t.detach() for t in data[:3]]
    rows = dict(advantage=data.advantage, old_logp=data.old_logp)
    # Rows without a gradient are removed: the others are compacted in place, over long distances.
    rows["advantage"][1000:3000] = 0
    options = dict(backend=backend, normalizer=N / 2, workspace_bytes=SPARSE_WORKSPACE[backend])
    sparse, gradients = learn(rows, *inputs, vocab_drop_tol=2.0**-8, **options)
    dense, wanted = learn(rows, *inputs, **options)
    assert torch.equal(sparse.logp, dense.logp) and torch.equal(sparse.entropy, dense.entropy)
    for found, other in zip(gradients[:2], wanted[:2]):
        assert near(found, other, 2e-2)
    assert near(gradients[0][-LAST:], wanted[0][-LAST:], 2e-2)


def test_mode_recompute_in_one_slab():
    inputs, coefficients = problem(N, D, V), random(3, N)
    _, gradients = score(coefficients, *inputs, backend="triton", workspace_bytes=WORKSPACE["triton"])
    _, wanted = score(coefficients, *inputs, backend="triton")
    for found, other in zip(gradients[:2], wanted[:2]):
        assert near(found, other) and near(found[-LAST:], other[-LAST:], 2 * CLOSE)
