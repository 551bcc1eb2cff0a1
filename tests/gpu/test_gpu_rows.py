"""Rows and options that tend to break kernels: extreme distributions, bias with -inf, softcap, temperature per row."""

import gpu_oracle as oracle
import pytest
import torch
from gpu_problems import BACKENDS, DEVICE, HEADS, learn, problem, random, score

from mssr_kernels import PolicyLossConfig

N = 37
WORKSPACE = 64 << 20
# Ours and eager's results are rounded alike; which of the two errors is larger in the last bit is luck.
LUCK = 1.05
# If all probabilities of a row are equal, so are their rounding errors, which then do not average out: whether ours or
# eager's error is larger is luck. The bound is half a bf16 ulp for dL/dlogits plus half for the result.
SAME_ROUNDING = 2.0**-8


def peaked(hidden, weight, target):
    return 40 * weight[target].float() / weight.shape[1], weight


def flat(hidden, weight, target):
    return 0.01 * random(*hidden.shape) / weight.shape[1] ** 0.5, weight


def all_equal(hidden, weight, target):
    return torch.zeros(hidden.shape, device=DEVICE), weight


def all_negative(hidden, weight, target):
    """Logits near -160: e^-160 is 0 in float32, so a running maximum that starts at 0 loses the row."""
    hidden, weight = hidden.float(), weight.clone()
    hidden[:, 0], weight[:, 0] = 20, -8
    return hidden, weight


def plus_minus_80(hidden, weight, target):
    hidden, weight = hidden.float() / 10, weight.clone()
    hidden[:, 0], weight[:, 0] = 8, 10 * random(len(weight)).sign()
    return hidden, weight


def last_column(hidden, weight, target):
    target[target >= 0] = len(weight) - 1
    return hidden, weight


KINDS = [peaked, flat, all_equal, all_negative, plus_minus_80, last_column]
EQUAL = (flat, all_equal, plus_minus_80)


def check(inputs, backend, rounding=0.0, **head):
    coefficients = random(3, N)
    loss = oracle.weighted(coefficients)
    exact, eager = (function(loss, *inputs, **head) for function in (oracle.differentiate, oracle.eager))
    found = score(coefficients, *inputs, backend=backend, workspace_bytes=WORKSPACE, **head)
    assert all(value.isfinite().all() for value in found[0])
    assert all(gradient is None or gradient.isfinite().all() for gradient in found[1])
    oracle.assert_no_less_exact(found, eager, exact, LUCK, rounding)

    config, rows = PolicyLossConfig(entropy_coef=0.1), dict(advantage=random(N))
    loss = oracle.policy(config, 5.0, **rows)
    exact, eager = (function(loss, *inputs, **head) for function in (oracle.differentiate, oracle.eager))
    result, gradients = learn(
        rows, *inputs, backend=backend, config=config, normalizer=5.0, workspace_bytes=WORKSPACE, **head
    )
    values = [result.logp, result.entropy, exact[0][2]]
    oracle.assert_no_less_exact((values, gradients), eager, exact, LUCK, rounding)
    kept = inputs[2] != -100
    assert (result.ratio[kept] == 1).all()  # on-policy
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_distributions(kind, backend):
    hidden, weight, target = problem(N, *HEADS["3b"])
    ignored = hidden.isnan().any(1)
    hidden, weight = kind(hidden, weight, target)
    hidden[ignored] = torch.nan
    check((hidden.bfloat16(), weight, target), backend, SAME_ROUNDING if kind in EQUAL else 0.0)


OPTIONS = ["temperature", "temperatures", "softcap", "bias", "masked", "all"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("option", OPTIONS)
def test_options(option, backend):
    hidden, weight, target = problem(N, *HEADS["3b"])
    head = {}
    if option == "temperature":
        head["temperature"] = 0.7
    if option in ("temperatures", "all"):
        head["temperature"] = 0.5 + torch.rand(N, device=DEVICE)
        head["temperature"][target == -100] = torch.nan
    if option in ("softcap", "all"):
        head["softcap"] = 30.0
    if option in ("bias", "masked", "all"):
        head["bias"] = random(len(weight)).bfloat16()
    if option == "masked":
        head["bias"][: len(weight) // 2] = -torch.inf  # whole tiles
        head["bias"][1::7] = -torch.inf
        head["bias"][target[target >= 0]] = 0.5
    found = check((hidden, weight, target), backend, **head)
    if option == "masked":
        masked = head["bias"].isinf()
        assert (found[1][1][masked] == 0).all() and (found[1][2][masked] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_row(backend):
    hidden, weight, target = problem(N, *HEADS["3b"])
    clean, _ = score(random(3, N), hidden, weight, target, backend=backend)
    hidden = hidden.clone()
    hidden[4, 7] = torch.nan
    found, _ = score(random(3, N), hidden, weight, target, backend=backend)
    others = torch.arange(N, device=DEVICE) != 4
    for value, wanted in zip(found, clean):
        assert value[4].isnan() and torch.equal(value[others], wanted[others])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_learn_from(backend):
    hidden, weight, target = problem(N, *HEADS["3b"])
    result, gradients = learn(dict(advantage=random(N)), hidden, weight, torch.full_like(target, -100), backend=backend)
    assert result.loss == 0 and all((gradient == 0).all() for gradient in gradients[:2])
