"""Every mistake gets a one-line error that says what is wrong, where, and what to do."""

import math

import pytest
import torch

from mssr_kernels import PolicyLossConfig, linear_logprob_entropy, linear_policy_loss

N, D, V = 6, 8, 30


def call(**changes):
    arguments = dict(
        hidden=torch.randn(N, D), weight=torch.randn(V, D), target=torch.randint(V, (N,)), advantage=torch.randn(N)
    )
    return linear_policy_loss(**(arguments | changes))


def labels(row, value):
    target = torch.zeros(N, dtype=torch.long)
    target[row] = value
    return target


CASES = [
    (dict(hidden=torch.randn(2, 3, D)), ValueError, r"hidden must be \[N, D\], got shape \[2, 3, 8\]"),
    (dict(hidden=[1.0]), TypeError, "hidden must be a tensor"),
    (dict(hidden=torch.zeros(N, D, dtype=torch.long)), TypeError, "hidden must be float32"),
    (dict(weight=torch.randn(V, D + 1)), ValueError, "D must agree"),
    (dict(weight=torch.randn(0, D)), ValueError, "V = 0.*call the head as a module"),
    (dict(weight=torch.randn(V, D).bfloat16()), TypeError, "hidden is float32 but weight is bfloat16"),
    (dict(weight=torch.empty(V, D, device="meta")), ValueError, "hidden is on cpu but weight is on meta"),
    (dict(bias=torch.randn(V - 1)), ValueError, "bias has 29 entries"),
    (dict(bias=torch.randn(V).double()), TypeError, "bias is float64"),
    (dict(target=torch.zeros(N)), TypeError, r"target must be int64, got float32: pass target.long\(\)"),
    (dict(target=labels(0, 0)[1:]), ValueError, "target has 5 rows but hidden has 6"),
    (dict(target=labels(4, V)), IndexError, r"target\[4\] is 30: outside \[0, 30\)"),
    (dict(target=labels(2, -1)), IndexError, r"target\[2\] is -1"),
    (dict(advantage=torch.randn(N, 1)), ValueError, r"advantage must be \[N\]"),
    (dict(advantage=torch.randn(N - 1)), ValueError, "advantage has 5 rows"),
    (dict(old_logp=torch.randn(N).bfloat16()), TypeError, "old_logp must be float32, got bfloat16"),
    (dict(temperature=0.0), ValueError, "temperature must be a finite number > 0"),
    (dict(temperature=math.nan), ValueError, "temperature must be"),
    (dict(temperature=torch.tensor([1.0, 1, 0, 1, 1, 1])), ValueError, r"temperature\[2\] is 0.0"),
    (dict(softcap=-1.0), ValueError, "softcap must be"),
    (dict(workspace_bytes=0), ValueError, "workspace_bytes must be > 0"),
    (dict(workspace_bytes=100), ValueError, "does not hold one row of logits.*pass at least"),
    (dict(normalizer=-1.0), ValueError, "normalizer must be"),
    (dict(normalizer=0.0), ValueError, "normalizer must be a finite number > 0"),
    (dict(normalizer=torch.ones(3)), ValueError, r"normalizer must be a number or a 0-d tensor, got shape \[3\]"),
    (dict(config=PolicyLossConfig(kl_coef=0.1)), ValueError, "kl_coef is 0.1 but ref_logp is missing"),
    (dict(config=PolicyLossConfig(tis_cap=2.0)), ValueError, "tis_cap is 2.0 but old_logp is missing"),
    (dict(config={}), TypeError, r"config must be a PolicyLossConfig, got dict: pass PolicyLossConfig\(...\)"),
    (dict(config=None), TypeError, "config must be a PolicyLossConfig, got NoneType"),
    (dict(backend="cuda"), ValueError, "'cuda' is not available: use 'auto', 'reference', 'chunked'"),
    (dict(vocab_drop_tol=1.5), ValueError, "vocab_drop_tol must be a probability in \\[0, 1\\) or None, got 1.5"),
]


@pytest.mark.parametrize("changes,error,message", CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_one_line_that_names_the_mistake(changes, error, message):
    with pytest.raises(error, match=message) as caught:
        call(**changes)
    assert "\n" not in str(caught.value)


DERIVATIVES = {
    "grad": lambda f, h: torch.func.grad(f)(h),
    "vjp": lambda f, h: torch.func.vjp(f, h)[1](torch.ones(()))[0],
    "jacrev": lambda f, h: torch.func.jacrev(f)(h),
    "grad of vmap": lambda f, h: torch.func.grad(lambda h: torch.func.vmap(f)(h[None]).sum())(h),
    "jvp": lambda f, h: torch.func.jvp(f, (h,), (torch.ones_like(h),))[1],
    "jacfwd": lambda f, h: torch.func.jacfwd(f)(h),
}


@pytest.mark.parametrize("transform", DERIVATIVES)
@pytest.mark.parametrize("loss", [True, False])
def test_derivatives_that_the_operators_do_not_have(transform, loss):
    """They would be 0, or an error of torch's inside."""
    hidden, weight, target, advantage = torch.randn(N, D), torch.randn(V, D), torch.randint(V, (N,)), torch.randn(N)

    def value(hidden, backend="auto"):
        if loss:
            return linear_policy_loss(hidden, weight, target, advantage, backend=backend).loss
        return linear_logprob_entropy(hidden, weight, target, backend=backend).logp.sum()

    derivative, mode = DERIVATIVES[transform], "forward-mode" if transform in ("jvp", "jacfwd") else "torch.func.grad"
    with pytest.raises(RuntimeError, match=f"^linear_.* {mode}.*backend='reference'$"):
        derivative(value, hidden)
    assert derivative(lambda hidden: value(hidden, "reference"), hidden).abs().sum() > 0


def test_the_suggested_workspace_is_enough():
    call(workspace_bytes=2000)
    with pytest.raises(ValueError) as caught:
        linear_logprob_entropy(torch.randn(N, D), torch.randn(V, D), labels(0, 0), workspace_bytes=100)
    call(workspace_bytes=int(str(caught.value).rsplit(" ", 1)[1]))


@pytest.mark.parametrize(
    "field,value",
    [
        ("clip_low", -0.1), ("clip_low", 1.5), ("clip_high", math.nan), ("dual_clip", 1.0), ("entropy_alpha", -1.0),
        ("entropy_kappa", 0.0), ("entropy_source", "approximate"), ("kl_coef", -1.0), ("kl_estimator", "k1"),
        ("entropy_coef", math.inf), ("tis_cap", 0.0), ("log_ratio_cap", 0.0),
        ("log_ratio_cap", 81.0),
    ],
)  # fmt: skip
def test_configuration_is_validated(field, value):
    with pytest.raises(ValueError, match=f"PolicyLossConfig.{field} must be"):
        PolicyLossConfig(**{field: value})
    assert getattr(PolicyLossConfig(), field) != value
