"""Peak memory beyond the inputs, at the 7B head, is within what the modes promise."""

import gc

import pytest
import torch
from gpu_problems import DEVICE, HEADS, policy_rows, problem

from mssr_kernels import PolicyLossConfig, linear_logprob_entropy, linear_policy_loss

N = 8192
D, V = HEADS["7b"]
MIB, GIB = 1 << 20, 1 << 30
WORKSPACE = 256 * MIB
# cuBLAS allocates up to 32 MiB per handle and stream; 16 MiB are for arrays with one number per row, or per tile and row.
SMALL = 48 * MIB


def peak(call, *leaves) -> int:
    """Return the peak bytes that a call adds. A first call lets the libraries allocate what they keep."""
    for _ in range(2):
        for leaf in leaves:
            leaf.grad = None
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()  # alive until the peak is read
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - before
        del result
    print(f"{extra / GIB:.3f} GiB")
    return extra


def inputs(weight_grad=True):
    hidden, weight, target = problem(N, D, V)
    hidden.nan_to_num_(0)
    return hidden.requires_grad_(), weight.detach().requires_grad_(weight_grad), target


def hidden_bytes(itemsize):
    return N * D * itemsize


@pytest.mark.parametrize("backend", ["triton", "chunked"])
def test_forward_holds_no_logits(backend):
    hidden, weight, target = inputs()
    with torch.no_grad():
        extra = peak(lambda: linear_logprob_entropy(hidden, weight, target, backend=backend, workspace_bytes=WORKSPACE))
    copy = hidden_bytes(2)  # of the kept rows
    if backend == "triton":  # nothing grows with V; 8 KiB per row for the parts of the vocabulary
        assert extra <= copy + N * 8192 + SMALL
    assert extra <= copy + WORKSPACE + SMALL


@pytest.mark.parametrize("backend", ["triton", "chunked"])
def test_mode_recompute(backend):
    """Allowed: workspace, dW in bf16, dH in float32 and bf16, a copy of the hidden rows. The workspace includes one
    unrounded slab of dW; a second may exist at the same time."""
    hidden, weight, target = inputs()

    def call():
        out = linear_logprob_entropy(hidden, weight, target, backend=backend, workspace_bytes=WORKSPACE)
        (out.logp + 0.1 * out.entropy).sum().backward()

    extra = peak(call, hidden, weight)
    rounding_slab = WORKSPACE // 2  # upper bound: 4 D of a column's 4 D + 2 N bytes
    assert extra <= WORKSPACE + rounding_slab + V * D * 2 + hidden_bytes(2 + 4 + 2) + SMALL


@pytest.mark.parametrize("tol", [None, 2.0**-8], ids=["exact", "sparse"])
@pytest.mark.parametrize("weight_grad", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("backend", ["triton", "chunked"])
def test_modes_exact_and_sparse(backend, weight_grad, tol):
    """Allowed: 0.6 GiB for the workspace and dH (float32, and bf16 as returned), and float32 dW. `backward` rounds dW to
    bf16, and both exist for a moment."""
    hidden, weight, target = inputs(weight_grad)
    with torch.no_grad():
        rows = policy_rows(linear_logprob_entropy(hidden, weight, target).logp)

    def loss():
        return linear_policy_loss(
            hidden, weight, target, **rows, config=PolicyLossConfig(kl_coef=0.01), backend=backend,
            workspace_bytes=WORKSPACE, vocab_drop_tol=tol,
        ).loss  # fmt: skip

    allowed = int(0.6 * GIB) + weight_grad * V * D * 4
    assert peak(loss, hidden, weight) <= allowed
    assert peak(lambda: loss().backward(), hidden, weight) <= allowed + weight_grad * V * D * 2


@pytest.mark.parametrize("workspace", [96 * MIB, 1024 * MIB])
def test_the_workspace_is_what_it_costs(workspace):
    hidden, weight, target = inputs(weight_grad=False)
    advantage = torch.ones(N, device=DEVICE)

    def loss():
        return linear_policy_loss(
            hidden, weight, target, advantage, backend="triton", workspace_bytes=workspace
        ).loss  # fmt: skip

    extra = peak(loss, hidden, weight)
    assert workspace / 2 <= extra <= workspace + hidden_bytes(4 + 2) + SMALL
