"""Log-ratios are clamped: no infinite ratio, no 0 * inf, in losses and gradients; rows within the cap are unchanged."""

import math

import pytest
import torch

from mssr_kernels import PolicyLossConfig, linear_logprob_entropy, linear_policy_loss
from mssr_kernels.liger import LigerFusedLinearGRPOLoss

BACKENDS = ("reference", "chunked", "triton")  # triton: under the interpreter
N, D, V = 12, 16, 60
CONFIG = PolicyLossConfig(dual_clip=None, kl_coef=0.3, entropy_coef=0.1, tis_cap=2.0)
RATIO = torch.tensor([100.0, -100, 300, math.inf, 19.0, -19, 21, -21, 0, 0.2, -0.3, 0])
KL = torch.tensor([0.0, 0, 0, 0.5, 100, -100, 300, -300, 0.1, math.inf, -0.2, 0])
ADVANTAGE = torch.tensor([0.0, 1, -1, 0, 1, -1, -1, -1, 1, -1, 0, 1])
CAPPED = ((RATIO.abs() > 20) | (KL.abs() > 20)).sum()


def problem(ratio=RATIO, kl=KL):
    hidden, weight, target = torch.randn(N, D), torch.randn(V, D), torch.randint(V, (N,))
    logp = linear_logprob_entropy(hidden, weight, target).logp
    rows = dict(advantage=ADVANTAGE, old_logp=logp - ratio, ref_logp=logp + kl, rollout_logp=logp - ratio)
    return hidden, weight, target, rows


def run(hidden, weight, target, rows, **options):
    hidden, weight = (tensor.clone().requires_grad_() for tensor in (hidden, weight))
    result = linear_policy_loss(hidden, weight, target, **rows, **options)
    result.loss.backward()
    return result, hidden.grad, weight.grad


def expected(hidden, weight, target, rows):
    """Return loss and gradients by autograd in float64; torch.clamp has no gradient where it clamps."""
    hidden, weight = (tensor.double().requires_grad_() for tensor in (hidden, weight))
    advantage, old, ref, rollout = (
        rows[name].double() for name in ("advantage", "old_logp", "ref_logp", "rollout_logp")
    )
    log_p = torch.log_softmax(hidden @ weight.T, 1)
    logp, entropy = log_p.gather(1, target[:, None])[:, 0], -(log_p.exp() * log_p).sum(1)
    shaped = advantage + torch.minimum(0.4 * entropy.detach(), advantage.abs() / 2)
    ratio, d = (logp - old).clamp(-20, 20).exp(), (ref - logp).clamp(-20, 20)
    weights = torch.where(old == rollout, 1.0, (old - rollout).exp().clamp(max=2))
    policy = -torch.minimum(ratio * shaped, ratio.clamp(0.8, 1.3) * shaped) * weights
    loss = (policy + 0.3 * (d.exp() - d - 1) - 0.1 * entropy).mean()
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("options", [{}, {"vocab_drop_tol": 2**-8}], ids=["exact", "sparse"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_log_ratios_beyond_the_cap_are_clamped_and_counted(backend, options):
    hidden, weight, target, rows = problem()
    rows["rollout_logp"][3] = 0.0  # not -inf as well: their difference would be NaN
    result, *found = run(hidden, weight, target, rows, backend=backend, config=CONFIG, **options)
    loss, *wanted = expected(hidden, weight, target, rows)
    torch.testing.assert_close(result.loss.double(), loss, rtol=1e-5, atol=0)
    for got, want in zip(found, wanted):
        assert (got - want).norm() <= (2e-2 if options else 1e-4) * want.norm()
    assert result.metrics.log_ratio_capped_sum == CAPPED
    assert result.ratio.max() == pytest.approx(math.exp(20), rel=1e-5)
    assert all(value.isfinite() for value in result.metrics)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_row_of_advantage_0_does_not_make_the_gradients_nan(backend):
    """A ratio beyond the largest float32 times an advantage of 0."""
    hidden, weight, target, rows = problem()
    kept = dict(advantage=rows["advantage"], old_logp=linear_logprob_entropy(hidden, weight, target).logp)
    kept["old_logp"][0] -= 100
    result, *found = run(hidden, weight, target, kept, backend=backend)
    hidden[0] = 0
    without, *wanted = run(
        hidden[1:], weight, target[1:], {k: v[1:] for k, v in kept.items()}, backend=backend, normalizer=12
    )
    torch.testing.assert_close(result.loss, without.loss)
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-4, atol=1e-7)
    assert (found[0][0] == 0).all() and result.metrics.log_ratio_capped_sum == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_within_the_cap_are_the_same_bits(backend):
    inputs = problem(RATIO.clamp(-19, 19), KL.clamp(-19, 19))
    capped, uncapped = (
        run(*inputs, backend=backend, config=PolicyLossConfig(kl_coef=0.3, log_ratio_cap=cap)) for cap in (20.0, 80.0)
    )
    for a, b in zip(
        (*capped[0][:-1], *capped[0].metrics, *capped[1:]), (*uncapped[0][:-1], *uncapped[0].metrics, *uncapped[1:])
    ):
        assert torch.equal(a, b)
    assert capped[0].metrics.log_ratio_capped_sum == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sampled_token_of_probability_0_is_not_0_times_infinity(backend):
    hidden, weight, target, rows = problem()
    rows = {
        "advantage": rows["advantage"],
        "old_logp": rows["old_logp"].clamp(min=-30),
        "rollout_logp": rows["ref_logp"] * 0,
    }
    rows["rollout_logp"][:] = -math.inf
    config = PolicyLossConfig(entropy_source="sampled_token")
    result, *gradients = run(hidden, weight, target, rows, backend=backend, config=config)
    assert result.metrics.shaping_sum == 0 and result.loss.isfinite() and gradients[1].isfinite().all()


@pytest.mark.parametrize("options", [{}, {"loss_type": "sapo"}, {"importance_sampling_level": "sequence"}], ids=str)
def test_liger_s_losses_have_the_same_cap(options):
    hidden, weight, target, rows = problem()
    hidden.requires_grad_()
    loss, _ = LigerFusedLinearGRPOLoss(**options)(
        hidden.view(3, 4, D), weight, target.view(3, 4), torch.ones(3, 4), torch.tensor([0.0, 1, -1]),
        old_per_token_logps=rows["ref_logp"].view(3, 4).clamp(-1e3, 0) - 500,
        ref_per_token_logps=rows["old_logp"].view(3, 4).clamp(-1e3, 1e3),
    )  # fmt: skip
    loss.backward()
    assert loss.isfinite() and hidden.grad.isfinite().all()
