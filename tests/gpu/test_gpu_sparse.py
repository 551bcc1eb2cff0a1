"""Mode `sparse`: what it drops per row is bounded, and on realistic rows its gradients are close to those of `exact`.

To test the bound, the weight is the identity: hidden states are logits, and the gradient by hidden is the gradient by logits.
"""

import math

import pytest
import torch
from gpu_problems import BACKENDS, DEVICE, HEADS, learn

from bench import inputs as realistic
from mssr_kernels import PolicyLossConfig, linear_policy_loss

V = 2000
N_REALISTIC = 2048
PLAIN = PolicyLossConfig(entropy_alpha=0.0)
TOLERANCES = [2.0**-4, 2.0**-8, 2.0**-12]


def one_column(rows):
    return torch.arange(rows), torch.randint(V, (rows,))


def certain(rows):
    logits = torch.randn(rows, V)
    logits[one_column(rows)] += torch.linspace(14, 40, rows)
    return logits


def forks(rows):
    logits = torch.randn(rows, V)
    for size in (20.0, 19.0, 17.5, 15.0, 12.0):
        logits[one_column(rows)] += size
    return logits


def flat(rows):
    return 0.01 * torch.randn(rows, V)


def bimodal(rows):
    """One column against a nearly uniform tail that holds from 0.5 down to 1e-6 of the probability."""
    tail = torch.logspace(math.log10(0.5), -6, rows)
    logits = 0.1 * torch.randn(rows, V)
    logits[one_column(rows)] = ((1 - tail) / tail * V).log()
    return logits


def heavy_tail(rows):
    order = torch.stack([torch.randperm(V) for _ in range(rows)])
    return -torch.linspace(1, 3, rows)[:, None] * torch.log(order + 1.0)


def crowded_tiles(rows):
    """All probability in 130 neighbouring columns: few tiles, each full."""
    logits = torch.full((rows, V), -30.0) + torch.randn(rows, V)
    for row in range(rows):
        start = int(torch.randint(V - 130, ()))
        logits[row, start : start + 130] += 30
    return logits


def extreme(rows):
    return torch.where(torch.rand(rows, V) < 0.002, 80.0, -80.0) + torch.randn(rows, V)


KINDS = [certain, forks, flat, bimodal, heavy_tail, crowded_tiles, extreme]


def gradient_by_logits(logits, target, advantage, tol, backend):
    logits = logits.clone().requires_grad_()
    identity = torch.eye(V, dtype=logits.dtype, device=DEVICE)
    linear_policy_loss(
        logits, identity, target, advantage, config=PLAIN, normalizer=1.0, backend=backend, vocab_drop_tol=tol
    ).loss.backward()
    return logits.grad.double()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tol", TOLERANCES)
@pytest.mark.parametrize("kinds", [*([kind] for kind in KINDS), KINDS], ids=lambda k: "+".join(f.__name__ for f in k))
def test_no_row_drops_more_than_its_tolerance(kinds, tol, dtype, backend):
    logits = torch.cat([kind(160 // len(kinds)) for kind in kinds]).to(DEVICE, dtype)
    p = logits.double().softmax(1)
    target = torch.multinomial(p, 1)[:, 0]
    target[0] = p[0].argmin()  # an improbable label is kept, too
    advantage = torch.randn(len(logits), device=DEVICE)
    got = gradient_by_logits(logits, target, advantage, tol, backend)
    # On-policy the derivative by logp is -A.
    exact = advantage.double()[:, None] * (p - torch.nn.functional.one_hot(target, V))
    dropped = (exact.abs() * (got == 0)).sum(1)
    assert (dropped <= (tol + 3e-6) * advantage.abs()).all(), (dropped / advantage.abs()).max()
    rounding = 3e-6 if dtype == torch.float32 else 2.0**-6  # rounding of w, dz and the result, over a 1-norm of up to 2
    difference = (got - exact).abs().sum(1)
    assert (difference <= (tol + rounding) * advantage.abs()).all(), (difference / advantage.abs()).max()
    label = exact.gather(1, target[:, None])
    assert (got.gather(1, target[:, None]) - label).abs().max() <= 2.0**-7 * advantage.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["peaked", "realistic", "flat"])
@pytest.mark.parametrize("model", HEADS)
def test_against_exact(model, kind, backend):
    data = realistic.make(N_REALISTIC, *HEADS[model], torch.bfloat16, DEVICE, kind)
    inputs, rows = [t.detach() for t in data[:3]], dict(advantage=data.advantage, old_logp=data.old_logp)
    results = {}
    for tol in (None, 2.0**-12, 2.0**-8):
        results[tol] = learn(rows, *inputs, backend=backend, vocab_drop_tol=tol)
    exact, wanted = results[None]
    for tol, limit in ((2.0**-12, 3e-3), (2.0**-8, 1e-2)):
        found, gradients = results[tol]
        for a, b in zip(found[:5], exact[:5]):
            if backend == "triton":
                assert torch.equal(a, b)
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # chunk sizes differ
        for a, b in zip(gradients[:2], wanted[:2]):
            assert a.isfinite().all()
            assert (a.float() - b.float()).norm() <= limit * b.float().norm()
