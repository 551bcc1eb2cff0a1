"""Mode `exact` and the reference backend: rows worked out by hand, then everything against the float64 oracle."""

import dataclasses
import math

import kernels_oracle as oracle
import pytest
import torch

from mssr_kernels import PolicyLossConfig, linear_logprob_entropy, linear_policy_loss

BACKENDS = ("reference", "chunked", "triton")  # triton: under the interpreter
FUSED = BACKENDS[1:]
PLAIN = PolicyLossConfig(entropy_alpha=0.0)
LOG = math.log


def two_logits(p):
    """Return hidden [N, 2] that, with the identity as weight, gives label 0 the probabilities p."""
    p = torch.tensor(p, dtype=torch.float64)
    return torch.stack([(p / (1 - p)).log(), torch.zeros_like(p)], 1).float()


# The probability is 1/2, and old_logp gives the ratio. Objective and slope (d objective / d logp) by hand.
CLIP_CASES = [
    # advantage, ratio, dual clip, objective, slope, clipped
    (+2.0, 1.0, 3.0, 2.0, 2.0, False),
    (+2.0, 1.2, 3.0, 2.4, 2.4, False),
    (+2.0, 1.5, 3.0, 2.6, 0.0, True),  # above 1.3
    (+2.0, 0.5, 3.0, 1.0, 1.0, False),  # below 0.8, but the minimum keeps it
    (-2.0, 1.0, 3.0, -2.0, -2.0, False),
    (-2.0, 0.5, 3.0, -1.6, 0.0, True),  # below 0.8
    (-2.0, 2.0, 3.0, -4.0, -4.0, False),  # above 1.3, but the minimum keeps it
    (-2.0, 5.0, 3.0, -6.0, 0.0, True),  # dual clip
    (-2.0, 5.0, None, -10.0, -10.0, False),
    (0.0, 5.0, 3.0, 0.0, 0.0, False),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("advantage,ratio,dual_clip,objective,slope,clipped", CLIP_CASES)
def test_every_branch_of_the_clip_by_hand(backend, advantage, ratio, dual_clip, objective, slope, clipped):
    hidden = two_logits([0.5]).requires_grad_()
    result = linear_policy_loss(
        hidden,
        torch.eye(2),
        torch.tensor([0]),
        torch.tensor([advantage]),
        torch.tensor([LOG(0.5 / ratio)]),
        config=PolicyLossConfig(entropy_alpha=0.0, dual_clip=dual_clip),
        backend=backend,
    )
    result.loss.backward()
    assert result.loss.item() == pytest.approx(-objective, rel=1e-5, abs=1e-7)
    assert result.ratio.item() == pytest.approx(ratio, rel=1e-5)
    assert result.clipped.item() is clipped
    # dlogp/dlogit_0 = 1 - p = 1/2, dlogp/dlogit_1 = -1/2
    torch.testing.assert_close(hidden.grad, torch.tensor([[-slope / 2, slope / 2]]), rtol=1e-5, atol=1e-7)
    dual = clipped and ratio > 3
    assert result.metrics.dual_clipped_sum.item() == dual
    assert result.metrics.clipped_sum.item() == (clipped and not dual)


@pytest.mark.parametrize("backend", BACKENDS)
def test_whole_row_by_hand(backend):
    """One row with every term: p = 1/4, A = -1, old log(1/5), rollout log(1/10), reference log(1/8)."""
    config = PolicyLossConfig(entropy_alpha=0.4, entropy_kappa=2.0, kl_coef=0.5, entropy_coef=0.1, tis_cap=1.5)
    result = linear_policy_loss(
        two_logits([0.25]),
        torch.eye(2),
        torch.tensor([0]),
        torch.tensor([-1.0]),
        torch.tensor([LOG(0.2)]),
        ref_logp=torch.tensor([LOG(0.125)]),
        rollout_logp=torch.tensor([LOG(0.1)]),
        normalizer=4.0,
        config=config,
        backend=backend,
    )
    entropy = -(0.25 * LOG(0.25) + 0.75 * LOG(0.75))  # 0.56234
    shaping = 0.4 * entropy  # 0.22493 < 1/2
    shaped = -1 + shaping
    policy = -(1.25 * shaped) * 1.5  # w = min(2, 1.5)
    kl = 0.5 - LOG(0.5) - 1
    assert result.loss.item() == pytest.approx((policy + 0.5 * kl - 0.1 * entropy) / 4, rel=1e-5)
    assert result.advantage.item() == pytest.approx(shaped, rel=1e-5)
    assert result.entropy.item() == pytest.approx(entropy, rel=1e-5)
    assert result.logp.item() == pytest.approx(LOG(0.25), rel=1e-5)
    metrics = {name: value.item() for name, value in result.metrics._asdict().items()}
    expected = dict(
        rows=1,
        policy_loss_sum=policy,
        kl_sum=kl,
        entropy_sum=entropy,
        clipped_sum=0,
        dual_clipped_sum=0,
        ratio_sum=1.25,
        ratio_max=1.25,
        tis_weight_sum=1.5,
        shaping_sum=shaping,
        log_ratio_capped_sum=0,
    )
    assert metrics == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ppo_is_the_clipped_objective_alone(backend):
    """The objective is flat only where the clip bounds it: no shaping, and no dual clip of a large ratio with A < 0."""
    ratios, config = torch.tensor([0.5, 1.1, 1.5, 9.0]), PolicyLossConfig.ppo()
    for sign, objective in ((1.0, torch.tensor([0.5, 1.1, 1.2, 1.2])), (-1.0, -torch.tensor([0.8, 1.1, 1.5, 9.0]))):
        result = linear_policy_loss(
            two_logits([0.5] * 4), torch.eye(2), torch.zeros(4, dtype=torch.long), torch.full((4,), sign),
            LOG(0.5) - ratios.log(), config=config, backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(result.loss, -objective.mean())
        assert (result.advantage == sign).all()
    assert PolicyLossConfig.ppo(clip_high=0.28, kl_coef=0.1) == dataclasses.replace(config, clip_high=0.28, kl_coef=0.1)
    with pytest.raises(ValueError, match="clip_low must be"):
        PolicyLossConfig.ppo(-0.1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_kappa_flips_the_sign_and_the_clip_follows(backend):
    """A = -1, kappa 1/2: A' = -1 + min(10 H, 2) = +1, so the ratio 1.5 is clipped at 1.3 and not dual-clipped."""
    hidden = two_logits([0.5]).requires_grad_()
    result = linear_policy_loss(
        hidden,
        torch.eye(2),
        torch.tensor([0]),
        torch.tensor([-1.0]),
        torch.tensor([LOG(0.5 / 1.5)]),
        backend=backend,
        config=PolicyLossConfig(entropy_alpha=10.0, entropy_kappa=0.5),
    )
    result.loss.backward()
    assert result.loss.item() == pytest.approx(-1.3, rel=1e-5) and result.clipped.item()
    assert (hidden.grad == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_sources_of_the_shaping_entropy(backend):
    def shaping(source="sampled_token", **arguments):
        return linear_policy_loss(
            two_logits([0.25]),
            torch.eye(2),
            torch.tensor([0]),
            torch.tensor([9.0]),
            backend=backend,
            config=PolicyLossConfig(entropy_alpha=1.0, entropy_source=source),
            **arguments,
        ).metrics.shaping_sum.item()

    old, rollout = {"old_logp": torch.tensor([LOG(0.2)])}, {"rollout_logp": torch.tensor([LOG(0.1)])}
    assert shaping(**old, **rollout) == pytest.approx(-0.1 * LOG(0.1), rel=1e-5)
    assert shaping(**old) == pytest.approx(-0.2 * LOG(0.2), rel=1e-5)
    assert shaping() == pytest.approx(-0.25 * LOG(0.25), rel=1e-5)
    assert shaping("exact", **old, **rollout) == pytest.approx(0.5623351, rel=1e-5)
    given = {"shaping_entropy": torch.tensor([0.7])}
    assert shaping(**old, **rollout, **given) == shaping("exact", **given) == pytest.approx(0.7)


def problem(n=60, d=19, v=500, dtype=torch.float32):
    hidden, weight, target = torch.randn(n, d).to(dtype), (0.5 * torch.randn(v, d)).to(dtype), torch.randint(v, (n,))
    with torch.no_grad():
        logp = linear_logprob_entropy(hidden, weight, target).logp
    arguments = dict(
        advantage=torch.randn(n),
        old_logp=logp + 0.5 * torch.randn(n),
        ref_logp=logp + 0.3 * torch.randn(n),
        rollout_logp=logp + 0.5 * torch.randn(n),
    )
    arguments["advantage"][5:9] = 0
    target[3] = -100
    arguments["advantage"][3] = math.nan
    hidden[3] = math.nan
    return hidden, weight, target, arguments


def run(backend, hidden, weight, target, bias=None, factor=1.0, **arguments):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (hidden, weight, bias)]
    arguments.setdefault("workspace_bytes", 64 << 10)
    result = linear_policy_loss(leaves[0], leaves[1], target, bias=leaves[2], backend=backend, **arguments)
    (result.loss * factor).backward()
    return result, [None if t is None else t.grad for t in leaves]


VARIANTS = {
    "default": {},
    "no shaping": dict(config=PLAIN),
    "no dual clip": dict(config=PolicyLossConfig(dual_clip=None)),
    "tight dual clip": dict(config=PolicyLossConfig(dual_clip=1.2)),
    "kappa below 1": dict(config=PolicyLossConfig(entropy_alpha=2.0, entropy_kappa=0.5)),
    "sampled token": dict(config=PolicyLossConfig(entropy_source="sampled_token")),
    "kl": dict(config=PolicyLossConfig(kl_coef=0.1)),
    "tis": dict(config=PolicyLossConfig(tis_cap=1.2)),
    "entropy bonus": dict(config=PolicyLossConfig(entropy_coef=0.2)),
    "entropy penalty": dict(config=PolicyLossConfig(entropy_coef=-0.2)),
    "everything": dict(
        config=PolicyLossConfig(kl_coef=0.1, entropy_coef=0.05, tis_cap=1.2),
        softcap=4.0,
        temperature="rows",
        bias="yes",
    ),
    "temperature": dict(temperature=0.6),
    "temperatures": dict(temperature="rows"),
    "bias": dict(bias="yes"),
    "softcap": dict(softcap=2.0),
    "on-policy": dict(old_logp=None),
    "normalizer": dict(normalizer=123.5),
    "normalizer below 1": dict(normalizer=0.25),
    "normalizer tensor": dict(normalizer=torch.tensor(77)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients(backend, variant):
    hidden, weight, target, arguments = problem()
    arguments |= VARIANTS[variant]
    if arguments.get("temperature") == "rows":
        arguments["temperature"] = 0.5 + torch.rand(len(target))
    bias = torch.randn(weight.shape[0]) if arguments.pop("bias", None) else None
    result, gradients = run(backend, hidden, weight, target, bias=bias, factor=3.0, **arguments)
    arguments.setdefault("config", PolicyLossConfig())
    loss, expected = oracle.gradients64(oracle.policy_loss, hidden, weight, target, bias=bias, **arguments)
    assert result.loss.dtype == torch.float32 and result.loss.ndim == 0
    torch.testing.assert_close(result.loss.double(), loss, rtol=1e-5, atol=1e-6)
    for got, want in zip(gradients, expected):
        if want is not None:
            torch.testing.assert_close(got.double(), 3 * want, rtol=1e-4, atol=2e-5 * want.abs().max().item())
    assert (gradients[0][3] == 0).all()
    for name in ("logp", "entropy", "advantage", "ratio", "clipped"):
        value = getattr(result, name)
        assert value.shape == target.shape and value[3] == 0 and not value.requires_grad
    assert result.clipped.dtype == torch.bool
    assert result.metrics.rows == len(target) - 1
    assert all(value.ndim == 0 and not value.requires_grad for value in result.metrics)


def test_chunked_agrees_with_reference_in_every_output():
    hidden, weight, target, arguments = problem()
    arguments["config"] = PolicyLossConfig(kl_coef=0.1, entropy_coef=0.05, tis_cap=1.2)
    (a, grads_a), (b, grads_b) = (
        run(backend, hidden.double(), weight.double(), target, **arguments) for backend in ("reference", "chunked")
    )
    for x, y in zip((*a[:-1], *a.metrics, *grads_a[:2]), (*b[:-1], *b.metrics, *grads_b[:2])):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


def test_on_policy_ratio_is_exactly_one():
    hidden, weight, target, arguments = problem()
    arguments["old_logp"] = None
    for backend in BACKENDS:
        result, gradients = run(backend, hidden, weight, target, config=PLAIN, **arguments)
        keep = target != -100
        assert (result.ratio[keep] == 1).all() and not result.clipped.any()
        assert gradients[0][keep & (arguments["advantage"] != 0)].abs().amax(1).min() > 0


def test_float32_is_as_exact_as_eager():
    hidden, weight, target, arguments = problem(n=64, d=256, v=2000)
    _, expected = oracle.gradients64(oracle.policy_loss, hidden, weight, target, config=PolicyLossConfig(), **arguments)
    errors = {}
    for backend in BACKENDS:
        _, gradients = run(backend, hidden, weight, target, **arguments, workspace_bytes=1 << 20)
        errors[backend] = [(got.double() - want).norm() / want.norm() for got, want in zip(gradients[:2], expected)]
    for backend in FUSED:
        for ours, theirs in zip(errors[backend], errors["reference"]):
            assert ours <= 2 * theirs + 1e-6


REAL = pytest.mark.slow("6 to 9 s each under the interpreter: a real vocabulary, a real number of rows")
REAL_SIZES = [(8192, 1000, 12), (129, 32007, 12), (5, 152064, 8)]


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize(
    "n,v,d", [(300, 1000, 12), (70, 33930, 8), *(pytest.param(*s, marks=REAL) for s in REAL_SIZES)]
)
def test_many_rows_and_columns(backend, n, v, d):
    hidden, weight, target, arguments = problem(n=n, v=v, d=d)
    target[-1] = v - 1
    result, gradients = run(backend, hidden, weight, target, **arguments, workspace_bytes=16 << 20)
    expected, exact = run("reference", hidden.double(), weight.double(), target, **arguments)
    torch.testing.assert_close(result.logp.double(), expected.logp, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.entropy.double(), expected.entropy, rtol=1e-5, atol=1e-5)
    for got, want in zip(gradients[:2], exact):
        assert (got - want).norm() <= 2e-5 * want.norm()


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_is_no_less_exact_than_16_bit_eager(backend, dtype):
    hidden, weight, target, arguments = problem(n=64, d=48, v=1000, dtype=dtype)
    arguments["old_logp"] = None
    keep = target != -100
    _, expected = oracle.gradients64(oracle.policy_loss, hidden, weight, target, config=PLAIN, **arguments)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    z = torch.nn.functional.linear(h[keep], w).float()
    logp = torch.log_softmax(z, 1).gather(1, target[keep, None])[:, 0]
    (-(logp - logp.detach()).exp() * arguments["advantage"][keep]).mean().backward()
    workspace = 256 << 10  # several chunks, in the triton backend, too
    _, gradients = run(backend, hidden, weight, target, config=PLAIN, **arguments, workspace_bytes=workspace)
    for ours, theirs, exact in zip(gradients, (h.grad, w.grad), expected):
        assert ours.dtype == dtype
        assert (ours.double() - exact).norm() <= (theirs.double() - exact).norm() + 1e-6


@pytest.mark.parametrize("backend", FUSED)
def test_result_does_not_depend_on_the_workspace(backend):
    hidden, weight, target, arguments = problem(n=129)
    config = PolicyLossConfig(entropy_coef=0.1)
    results = []
    for workspace in (80 << 10, 250 << 10, 256 << 20):
        result, gradients = run(backend, hidden, weight, target, config=config, **arguments, workspace_bytes=workspace)
        results.append((*result[:5], *gradients[:2]))
    for other in results[1:]:
        for a, b in zip(results[0], other):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", FUSED)
def test_micro_batches_with_a_global_normalizer_add_up(backend):
    hidden, weight, target, arguments = problem()
    whole, gradients = run(backend, hidden, weight, target, normalizer=59.0, **arguments)
    parts = []
    for rows in (slice(0, 10), slice(10, 60)):
        piece = {name: value[rows] for name, value in arguments.items()}
        parts.append(run(backend, hidden[rows], weight, target[rows], normalizer=torch.tensor(59.0), **piece))
    torch.testing.assert_close(sum(part.loss for part, _ in parts), whole.loss)
    torch.testing.assert_close(sum(gradient[1] for _, gradient in parts), gradients[1], rtol=1e-4, atol=1e-7)
    for name in ("rows", "policy_loss_sum", "entropy_sum", "clipped_sum", "ratio_sum", "shaping_sum"):
        total = sum(getattr(part.metrics, name) for part, _ in parts)
        torch.testing.assert_close(total, getattr(whole.metrics, name))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [0, 4])
def test_nothing_to_learn_from(backend, n):
    hidden, weight = torch.full((n, 8), math.nan), torch.randn(30, 8)
    for normalizer in (None, 3.0, torch.tensor(3.0)):
        result, gradients = run(
            backend, hidden, weight, torch.full((n,), -100), advantage=torch.full((n,), math.nan), normalizer=normalizer
        )
        assert result.loss == 0 and result.metrics.rows == 0 and result.metrics.ratio_max == 0
        assert torch.equal(gradients[0], torch.zeros(n, 8)) and torch.equal(gradients[1], torch.zeros(30, 8))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_not_hidden(backend):
    hidden, weight, target, arguments = problem()
    for name in ("hidden", "advantage", "old_logp"):
        poisoned = {"hidden": hidden, **arguments}
        poisoned[name] = poisoned[name].clone()
        poisoned[name][1] = math.nan
        result, gradients = run(backend, poisoned.pop("hidden"), weight, target, **poisoned)
        assert result.loss.isnan(), name
        if backend in FUSED:
            assert gradients[0][1].isnan().any(), name


@pytest.mark.parametrize("backend", FUSED)
def test_second_backward_is_refused(backend):
    hidden, weight, target, arguments = problem()
    weight.requires_grad_()
    loss = linear_policy_loss(hidden, weight, target, **arguments, backend=backend).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call the function again"):
        loss.backward()
    loss = linear_policy_loss(hidden, weight, target, **arguments, backend=backend).loss
    with pytest.raises(RuntimeError, match="no double backward"):
        torch.autograd.grad(loss, weight, create_graph=True)


def test_no_gradient_no_graph():
    hidden, weight, target, arguments = problem()
    assert not linear_policy_loss(hidden, weight, target, **arguments).loss.requires_grad
    with torch.no_grad():
        assert not linear_policy_loss(hidden, weight.requires_grad_(), target, **arguments).loss.requires_grad


@pytest.mark.parametrize("backend", FUSED)
def test_autocast_casts_like_linear(backend):
    hidden, weight, target, arguments = problem()
    with torch.autocast("cpu", torch.bfloat16):
        result, gradients = run(backend, hidden, weight, target, **arguments)
    expected, _ = run(backend, hidden.bfloat16(), weight.bfloat16(), target, **arguments)
    assert torch.equal(result.loss, expected.loss) and result.loss.dtype == torch.float32
    assert gradients[1].dtype == torch.float32
