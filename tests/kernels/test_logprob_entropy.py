"""Mode `recompute` and the forward statistics, against the float64 oracle."""

import math

import kernels_oracle as oracle
import pytest
import torch

from mssr_kernels import linear_logprob_entropy

BACKENDS = ("reference", "chunked", "triton")  # triton: under the interpreter
FUSED = BACKENDS[1:]
SMALL_WORKSPACE = 1 << 18


def make(n, d, v, scale=1.0, dtype=torch.float32):
    return torch.randn(n, d).to(dtype), (scale * torch.randn(v, d)).to(dtype), torch.randint(v, (n,))


def weighted(logp, entropy, lse, c):
    return (c[0] * logp + c[1] * entropy + c[2] * lse).sum()


def compare(
    hidden,
    weight,
    target,
    coefficients,
    tolerance=2e-5,
    bias=None,
    backend="chunked",
    workspace=SMALL_WORKSPACE,
    **head,
):
    """Compare outputs and gradients of a backend with the oracle. Return the backend's outputs and leaves."""

    def wanted(h, w, bias):
        return weighted(*oracle.logprob_entropy(h, w, target, bias=bias, **head), coefficients.double())

    _, expected = oracle.gradients64(wanted, hidden, weight, bias=bias)
    exact = oracle.logprob_entropy(
        hidden.double(), weight.double(), target, bias=None if bias is None else bias.double(), **head
    )
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (hidden, weight, bias)]
    got = linear_logprob_entropy(
        leaves[0], leaves[1], target, bias=leaves[2], backend=backend, workspace_bytes=workspace, **head
    )
    for value, reference in zip(got, exact):
        assert value.dtype == torch.float32 and value.shape == target.shape
        torch.testing.assert_close(value.double(), reference, rtol=tolerance, atol=tolerance)
    weighted(*got, coefficients).backward()
    for leaf, reference in zip(leaves, expected):
        if leaf is not None:
            size = reference.abs().max().item()
            torch.testing.assert_close(leaf.grad.double(), reference, rtol=tolerance, atol=tolerance * max(size, 1e-3))
    return got, leaves


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [1, 7, 128, 129])
def test_all_outputs_and_gradients(backend, n):
    hidden, weight, target = make(n, 37, 1000, scale=0.5)
    target[-1] = 999  # the last column
    compare(hidden, weight, target, torch.randn(3, n), backend=backend, workspace=64 << 10)


REAL = pytest.mark.slow("10 s each under the interpreter: a real vocabulary, a real number of rows")
# The smaller sizes cover the same cases: parts of several tiles, no multiple of a tile, several row tiles.
LARGE = [(33930, 3, 8), (32007, 7, 19), (1000, 300, 5)]


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("v,n,d", [*LARGE, *(pytest.param(*s, marks=REAL) for s in [(151936, 3, 8), (1000, 8192, 5)])])
def test_large_vocabulary(backend, v, n, d):
    hidden, weight, target = make(n, d, v)
    target[0] = v - 1
    # Float32 sums over so many columns have this error, also in the eager reference.
    compare(hidden, weight, target, torch.randn(3, n), workspace=64 << 20, tolerance=3e-4, backend=backend)


@pytest.mark.parametrize("row", ["peaked", "flat", "negative", "eighty"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_of_distribution(row, backend):
    """The weight is the identity, so that the hidden states are the logits."""
    v = 200
    logits = torch.randn(9, v)
    target = torch.randint(v, (9,))
    if row == "peaked":
        logits[torch.arange(9), target] += 25
    elif row == "flat":
        logits = torch.zeros(9, v)
    elif row == "negative":
        logits -= 160  # e^-160 is 0 in float32: a running maximum that starts at 0 loses the row
    else:
        logits = torch.where(torch.rand(9, v) < 0.5, 80.0, -80.0)
    got, _ = compare(logits, torch.eye(v), target, torch.randn(3, 9), backend=backend)
    assert (got.logp <= 0).all() and (got.entropy >= 0).all()
    assert (got.entropy <= math.log(v) * (1 + 1e-6)).all()
    if row == "flat":
        torch.testing.assert_close(got.entropy, torch.full((9,), math.log(v)))
        torch.testing.assert_close(got.logp, torch.full((9,), -math.log(v)))


@pytest.mark.parametrize("backend", FUSED)
def test_softcap_bias_and_temperatures(backend):
    hidden, weight, target = make(33, 20, 500)
    coefficients, bias = torch.randn(3, 33), torch.randn(500)
    for temperature in (0.7, 0.5 + torch.rand(33)):
        compare(hidden, weight, target, coefficients, bias=bias, softcap=3.0, temperature=temperature, backend=backend)
        compare(hidden, weight, target, coefficients, temperature=temperature, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_of_minus_infinity_masks_a_column(backend):
    hidden, weight, target = make(5, 16, 64)
    target[:] = torch.arange(5)
    bias = torch.zeros(64)
    bias[40:] = -math.inf
    leaf = hidden.clone().requires_grad_()
    got = linear_logprob_entropy(leaf, weight, target, bias=bias, backend=backend)
    without = linear_logprob_entropy(hidden.double(), weight[:40].double(), target, backend="reference")
    for a, b in zip(got, without):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    (got.logp + got.entropy).sum().backward()
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_masking_by_the_lowest_number_is_masking(backend):
    """Some users mask with -3e38 instead of -inf: whole tiles of such columns, whose sums overflow."""
    hidden, weight, target = make(5, 16, 1500)
    target[:] = torch.tensor([1200, 1201, 1300, 1499, 1400])
    results = []
    for lowest in (-math.inf, torch.finfo(torch.float32).min):
        bias = torch.zeros(1500)
        bias[:1100] = lowest
        leaf = hidden.clone().requires_grad_()
        out = linear_logprob_entropy(leaf, weight, target, bias=bias, backend=backend)
        (out.logp + out.entropy).sum().backward()
        results.append((*out, leaf.grad))
    for a, b in zip(*results):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_rows_are_inert(backend):
    hidden, weight, target = make(20, 12, 300)
    bias = torch.randn(300, requires_grad=True)
    target[3], target[11] = -100, -100
    poisoned = hidden.clone()
    poisoned[3], poisoned[11] = math.nan, math.inf
    temperature = torch.full((20,), 1.3)
    clean_t, bad_t = temperature, temperature.clone()
    bad_t[3] = math.nan
    results = []
    for h, t in ((hidden, clean_t), (poisoned, bad_t)):
        h, w = h.clone().requires_grad_(), weight.clone().requires_grad_()
        bias.grad = None
        out = linear_logprob_entropy(h, w, target, bias=bias, temperature=t, backend=backend)
        (out.logp * 0.3 + out.entropy).sum().backward()
        assert all((value[[3, 11]] == 0).all() for value in out) and (h.grad[[3, 11]] == 0).all()
        results.append((*out, h.grad, w.grad, bias.grad))
    for a, b in zip(*results):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", FUSED)
def test_other_ignore_index(backend):
    hidden, weight, target = make(4, 8, 30)
    target[2] = -1
    compare(hidden, weight, target, torch.randn(3, 4), ignore_index=-1, backend=backend)
    target[2] = 7  # an index inside the vocabulary may be ignored, too
    compare(hidden, weight, target, torch.randn(3, 4), ignore_index=7, backend=backend)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("used", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)])
def test_missing_upstream_gradients(backend, used):
    hidden, weight, target = make(40, 16, 300)
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    out = linear_logprob_entropy(*leaves, target, workspace_bytes=64 << 10, backend=backend)
    sum(value.sum() for value, use in zip(out, used) if use).backward()  # upstream: expanded by .sum(), or None
    _, expected = oracle.gradients64(
        lambda h, w, bias: sum(v.sum() for v, use in zip(oracle.logprob_entropy(h, w, target), used) if use),
        hidden,
        weight,
    )
    for leaf, reference in zip(leaves, expected):
        torch.testing.assert_close(leaf.grad.double(), reference, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("backend", FUSED)
def test_strided_inputs_and_upstream(backend):
    hidden, weight, target = make(40, 16, 300)
    coefficients = torch.randn(40, 3).T  # strided
    wide = torch.randn(16, 80)
    compare(wide.T[::2], weight, target, coefficients, backend=backend)
    if backend == "triton":
        with pytest.raises(ValueError, match="needs the rows of weight .* contiguous"):
            compare(hidden, torch.randn(16, 300).T, target, coefficients, backend=backend)
    else:
        compare(hidden, torch.randn(16, 300).T, target, coefficients, backend=backend)
    compare(hidden[:1].expand(40, 16), weight, target, coefficients, backend=backend)
    strided_target = torch.stack([target, target], dim=1)[:, 0]
    compare(hidden, weight, strided_target, coefficients, backend=backend)


@pytest.mark.parametrize("backend", FUSED)
def test_frozen_parts_get_no_gradient_and_are_not_computed(backend):
    hidden, weight, target = make(12, 16, 300)
    full_h, full_w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    linear_logprob_entropy(full_h, full_w, target, backend=backend).logp.sum().backward()
    only_h = hidden.clone().requires_grad_()
    linear_logprob_entropy(only_h, weight, target, backend=backend).logp.sum().backward()
    only_w = weight.clone().requires_grad_()
    linear_logprob_entropy(hidden, only_w, target, backend=backend).logp.sum().backward()
    assert torch.equal(only_h.grad, full_h.grad) and torch.equal(only_w.grad, full_w.grad)
    assert not linear_logprob_entropy(hidden, weight, target, backend=backend).logp.requires_grad
    with torch.no_grad():
        assert not linear_logprob_entropy(full_h, full_w, target, backend=backend).logp.requires_grad


@pytest.mark.parametrize("backend", FUSED)
def test_result_does_not_depend_on_the_workspace(backend):
    hidden, weight, target = make(129, 24, 1000, scale=0.5)
    results = []
    for workspace in (40 << 10, 300 << 10, 256 << 20):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = linear_logprob_entropy(h, w, target, workspace_bytes=workspace, backend=backend)
        (out.logp + 0.5 * out.entropy).mean().backward()
        results.append((*out, h.grad, w.grad))
    for other in results[1:]:
        for a, b in zip(results[0], other):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_float64_passes_gradcheck():
    hidden, weight, bias = torch.randn(5, 6).double(), torch.randn(11, 6).double(), torch.randn(11).double()
    target = torch.tensor([0, 10, -100, 3, 10])
    temperature = (0.5 + torch.rand(5)).double()

    def function(h, w, b):
        return linear_logprob_entropy(
            h, w, target, bias=b, temperature=temperature, softcap=2.0, backend="chunked", workspace_bytes=600
        )

    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("backend", FUSED)
def test_double_backward_is_refused(backend):
    hidden, weight, target = make(3, 8, 30)
    hidden.requires_grad_()
    logp = linear_logprob_entropy(hidden, weight, target, backend=backend).logp
    with pytest.raises(RuntimeError, match="no double backward"):
        torch.autograd.grad(logp.sum(), hidden, create_graph=True)


@pytest.mark.parametrize("backend", FUSED)
def test_retain_graph_works(backend):
    hidden, weight, target = make(3, 8, 30)
    hidden.requires_grad_()
    logp = linear_logprob_entropy(hidden, weight, target, backend=backend).logp.sum()
    logp.backward(retain_graph=True)
    once = hidden.grad.clone()
    logp.backward()
    assert torch.equal(hidden.grad, 2 * once)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [0, 4])
def test_nothing_to_score(backend, n):
    hidden, weight = torch.randn(n, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    out = linear_logprob_entropy(hidden, weight, torch.full((n,), -100), backend=backend)
    assert all(torch.equal(value, torch.zeros(n)) for value in out)
    (out.logp.sum() + out.entropy.sum()).backward()
    assert (weight.grad == 0).all() and (hidden.grad == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_not_hidden(backend):
    hidden, weight, target = make(4, 8, 30)
    hidden[2] = math.nan
    out = linear_logprob_entropy(hidden, weight, target, backend=backend)
    assert out.logp[2].isnan() and out.entropy[2].isnan() and out.logp[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_is_no_less_exact_than_16_bit_eager(backend, dtype):
    """The error against float64 is at most that of the 16-bit eager implementation + 1e-6."""
    hidden, weight, target = make(64, 48, 1000, scale=0.3, dtype=dtype)
    c = torch.randn(3, 64)
    _, expected = oracle.gradients64(
        lambda h, w, bias: weighted(*oracle.logprob_entropy(h, w, target), c.double()), hidden, weight
    )
    exact = oracle.logprob_entropy(hidden.double(), weight.double(), target)

    def eager(h, w):
        z = torch.nn.functional.linear(h, w).float()
        log_p = torch.log_softmax(z, 1)
        return log_p.gather(1, target[:, None])[:, 0], -(log_p.exp() * log_p).sum(1), torch.logsumexp(z, 1)

    errors = {}
    for name, function in (
        ("eager", eager),
        (backend, lambda h, w: linear_logprob_entropy(h, w, target, backend=backend)),
    ):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = function(h, w)
        weighted(*out, c).backward()
        assert h.grad.dtype == w.grad.dtype == dtype
        pairs = [*zip(out, exact), (h.grad, expected[0]), (w.grad, expected[1])]
        errors[name] = [(a.double() - b).norm().item() for a, b in pairs]
    for ours, theirs in zip(errors[backend], errors["eager"]):
        assert ours <= theirs + 1e-6


@pytest.mark.parametrize("backend", FUSED)
def test_autocast_casts_like_linear(backend):
    hidden, weight, target = make(9, 16, 100)
    hidden.requires_grad_(), weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_logprob_entropy(hidden, weight, target, backend=backend)
        out.logp.sum().backward()  # the backward also runs under autocast, which would cast its matmuls
    expected = linear_logprob_entropy(hidden.detach().bfloat16(), weight.detach().bfloat16(), target, backend=backend)
    assert torch.equal(out.logp, expected.logp)
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
