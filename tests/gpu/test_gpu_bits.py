"""Bitwise reproducibility. Triton: a row's values depend on that row only. Both backends: repeated runs are equal."""

import pytest
import torch
from gpu_problems import BACKENDS, DEVICE, HEADS, learn, policy_rows, problem, random, score

from mssr_kernels import PolicyLossConfig, linear_logprob_entropy

MANY = 4096
SUBSETS = (1, 7, 129)
WORKSPACES = (64 << 20, 256 << 20, 2 << 30)


def scores(hidden, weight, target, **arguments):
    with torch.no_grad():
        return linear_logprob_entropy(hidden, weight, target, backend="triton", **arguments)


def same(found, wanted):
    return all(torch.equal(a, b) for a, b in zip(found, wanted))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model", HEADS)
def test_a_row_does_not_depend_on_its_batch(model, dtype):
    inputs = problem(MANY, *HEADS[model], dtype)
    whole = scores(*inputs)
    assert same(scores(*inputs), whole)
    for n in SUBSETS:
        for rows in (torch.arange(n), torch.arange(MANY - n, MANY), torch.randperm(MANY)[:n]):
            rows = rows.to(DEVICE)
            part = scores(inputs[0][rows], inputs[1], inputs[2][rows])
            assert same(part, [field[rows] for field in whole]), n


def test_a_row_does_not_depend_on_its_batch_with_every_option():
    """Bias, softcap and a temperature per row change the tile and the kernel."""
    hidden, weight, target = problem(MANY // 4, *HEADS["3b"])
    head, n = dict(bias=random(len(weight)).bfloat16(), softcap=30.0), len(target)
    temperature = 0.5 + torch.rand(n, device=DEVICE)
    whole = scores(hidden, weight, target, temperature=temperature, **head)
    for rows in (torch.arange(1), torch.arange(n - 7, n), torch.randperm(n)[:129]):
        rows = rows.to(DEVICE)
        part = scores(hidden[rows], weight, target[rows], temperature=temperature[rows], **head)
        assert same(part, [field[rows] for field in whole])
    number, tensor = (scores(hidden, weight, target, temperature=t) for t in (0.7, torch.full_like(temperature, 0.7)))
    assert same(number, tensor)


@pytest.mark.parametrize("model", HEADS)
def test_values_do_not_depend_on_gradients_or_workspace(model):
    inputs = problem(MANY // 2, *HEADS[model])
    whole = scores(*inputs)
    rows = policy_rows(whole.logp)
    for workspace in WORKSPACES:
        for tol in (None, 2.0**-8):
            result, _ = learn(rows, *inputs, backend="triton", workspace_bytes=workspace, vocab_drop_tol=tol)
            assert same((result.logp, result.entropy), whole[:2]), (workspace, tol)
    values, _ = score(random(3, len(inputs[2])), *inputs, backend="triton", workspace_bytes=WORKSPACES[0])
    assert same(values, whole)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["exact", "sparse", "recompute"])
def test_repeated_runs_give_the_same_gradients(mode, backend):
    inputs = problem(MANY // 4, *HEADS["3b"])
    rows, coefficients = policy_rows(scores(*inputs).logp), random(3, len(inputs[2]))
    results = []
    for _ in range(3):
        if mode == "recompute":
            values, gradients = score(coefficients, *inputs, backend=backend)
        else:
            result, gradients = learn(
                rows,
                *inputs,
                backend=backend,
                config=PolicyLossConfig(entropy_coef=0.01),
                vocab_drop_tol=2.0**-8 if mode == "sparse" else None,
            )
            values = result[:5]
        results.append([*values, *gradients[:2]])
    assert all(same(other, results[0]) for other in results[1:])


def test_descriptors_and_pointers_give_the_same_bits():
    """A weight at an unaligned address, like FSDP's views into flat storage, is read through pointers."""
    hidden, weight, target = problem(MANY // 16, 512, 32007)
    flat = torch.empty(weight.numel() + 1, dtype=weight.dtype, device=DEVICE)
    shifted = flat[1:].view(weight.shape).copy_(weight)
    assert weight.data_ptr() % 16 == 0 and shifted.data_ptr() % 16 == 2
    assert same(scores(hidden, shifted, target), scores(hidden, weight, target))
    rows = policy_rows(scores(hidden, weight, target).logp)
    (a, grads_a), (b, grads_b) = (learn(rows, hidden, w, target, backend="triton") for w in (weight, shifted))
    assert same(a[1:5], b[1:5])
    for x, y in zip(grads_a[:2], grads_b[:2]):  # the BLAS computes these products, and may round differently
        assert (x.float() - y.float()).norm() <= 4e-3 * x.float().norm()
