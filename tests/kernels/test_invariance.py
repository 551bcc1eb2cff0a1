"""A row's values do not depend on the other rows, on the chunks, or on whether gradients are computed.

This holds bitwise in the Triton backend. The chunked backend has the rounding of its BLAS.
"""

import pytest
import torch

from mssr_kernels import linear_logprob_entropy, linear_policy_loss

N, D, V = 150, 40, 1500


def inputs(dtype=torch.float32):
    hidden, weight = torch.randn(N, D).to(dtype), (0.5 * torch.randn(V, D)).to(dtype)
    return hidden, weight, torch.randint(V, (N,)), torch.randn(N)


def same(backend, a, b):
    if backend == "triton":
        assert all(torch.equal(x, y) for x, y in zip(a, b))
    else:
        torch.testing.assert_close(list(a), list(b), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_values_do_not_depend_on_the_batch(backend, dtype):
    hidden, weight, target, _ = inputs(dtype)
    temperature = 0.5 + torch.rand(N)
    whole = linear_logprob_entropy(hidden, weight, target, temperature=temperature, backend=backend)
    for rows in (slice(0, 1), slice(3, 10), slice(11, 140), torch.randperm(N)):
        part = linear_logprob_entropy(
            hidden[rows], weight, target[rows], temperature=temperature[rows], backend=backend
        )
        same(backend, part, [value[rows] for value in whole])
    ignored = torch.where(torch.arange(N) % 3 == 0, -100, target)
    part = linear_logprob_entropy(hidden, weight, ignored, temperature=temperature, backend=backend)
    kept = ignored != -100
    same(backend, [value[kept] for value in part], [value[kept] for value in whole])


@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_values_do_not_depend_on_gradients_mode_or_chunks(backend):
    hidden, weight, target, advantage = inputs()
    with torch.no_grad():
        alone = linear_logprob_entropy(hidden, weight, target, backend=backend)[:2]
    weight.requires_grad_()
    same(backend, linear_logprob_entropy(hidden, weight, target, backend=backend)[:2], alone)
    for tolerance in (None, 2.0**-8):
        for workspace in (1 << 19, 256 << 20):
            result = linear_policy_loss(
                hidden, weight, target, advantage, backend=backend, workspace_bytes=workspace, vocab_drop_tol=tolerance
            )
            same(backend, (result.logp, result.entropy), alone)


@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_a_repeated_call_gives_the_same_bits(backend):
    hidden, weight, target, advantage = inputs()
    results = []
    for _ in range(2):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        result = linear_policy_loss(*leaves, target, advantage, backend=backend, vocab_drop_tol=2.0**-6)
        result.loss.backward()
        results.append((result.loss, result.logp, result.entropy, *(leaf.grad for leaf in leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results))
