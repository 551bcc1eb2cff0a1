"""Features of CUDA only: GEMMs of 16-bit operands into float32, streams, device-side assertions, inductor, loss scaling."""

import os
import subprocess
import sys

import pytest
import torch
from gpu_problems import DEVICE, HEADS, learn, policy_rows, problem, random, score
from torch import nn

from mssr_kernels import FusedLMHead, PolicyLossConfig, explain, linear_logprob_entropy, linear_policy_loss
from mssr_kernels.backends.matmul import HeadMatmul

HALVES = [torch.bfloat16, torch.float16]
V, D = 5003, 512
COLUMNS = slice(1000, 4001)


def padded(rows, columns, dtype, fill):
    """Return [rows, columns] with padded lines, as the backends store logits."""
    line = -(-columns // 16) * 16 + 16
    return torch.full((rows, line), fill, dtype=dtype, device=DEVICE)[:, :columns]


def close(found, wanted):
    """Whether products and sums are in float32, as tensor cores compute them; rounding to 16 bits costs 1e-3."""
    return (found.double() - wanted).norm() <= 2e-5 * wanted.norm()


@pytest.fixture(params=HALVES, ids=str)
def matmul(request):
    weight = random(V, D).to(request.param)
    return HeadMatmul(weight, torch.float32, 1 << 20)


def test_16_bit_operands_stay_what_they_are(matmul):
    assert DEVICE == "cpu" or (matmul.mixed and not matmul.upcasts and matmul.slab == V)
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("rows", [1, 7, 129, 1000])
@pytest.mark.parametrize("columns", [None, COLUMNS])
def test_logits(matmul, rows, columns):
    h = random(rows, D).to(matmul.operand_dtype)
    weight = matmul.weight if columns is None else matmul.weight[columns]
    for out in (padded(len(weight), rows, torch.float32, torch.nan), random(len(weight), rows)):
        matmul.logits(h, out=out, columns=columns)
        assert close(out, weight.double() @ h.double().T)


@pytest.mark.parametrize("rows", [1, 7, 129, 1000])
@pytest.mark.parametrize("columns", [None, COLUMNS, torch.arange(3, V, 17)], ids=["all", "slice", "gathered"])
def test_hidden_gradient(matmul, rows, columns):
    columns = columns.to(DEVICE) if isinstance(columns, torch.Tensor) else columns
    weight = matmul.weight if columns is None else matmul.weight[columns]
    dz = padded(len(weight), rows, matmul.operand_dtype, 0).copy_(random(len(weight), rows))
    for dz_ in (dz, dz.contiguous()):
        product = dz_.double().T @ weight.double()
        out = torch.full((rows, D), torch.nan, device=DEVICE)  # with beta 0 it must not be read
        matmul.add_hidden_grad(dz_, out=out, columns=columns, beta=0)
        assert close(out, product)
        matmul.add_hidden_grad(dz_, out=out, columns=columns)
        assert close(out, 2 * product)


@pytest.mark.parametrize("rows", [1, 7, 129, 1000])
def test_weight_gradient(matmul, rows):
    h = random(rows, D).to(matmul.operand_dtype)
    dz = padded(V, rows, matmul.operand_dtype, 0).copy_(random(V, rows))
    for dz_ in (dz, dz.contiguous(), dz[COLUMNS]):
        product = dz_.double() @ h.double()
        whole = torch.full((V, D), torch.nan, device=DEVICE)
        out = whole[: len(dz_)]
        matmul.add_weight_grad(dz_, h, out=out, beta=0)
        assert close(out, product)
        matmul.add_weight_grad(dz_, h, out=out)
        assert close(out, 2 * product)
        assert whole[len(dz_) :].isnan().all()


@pytest.mark.parametrize("rows", [64, 128, 129, 761])
@pytest.mark.parametrize("terms", [10241, 10247, 28339])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_no_term_of_a_sum_is_lost(terms, rows, dtype):
    """cuBLAS of CUDA 13.0 can lose the last of 10,241 terms; `HeadMatmul` prevents that."""
    matmul = HeadMatmul(random(terms, 2048).to(dtype), torch.float32, 1 << 20)
    dz = padded(terms, rows, dtype, torch.nan).copy_(random(terms, rows))
    d_hidden = torch.empty(rows, 2048, device=DEVICE)
    matmul.add_hidden_grad(dz, out=d_hidden, beta=0)
    assert close(d_hidden, dz.double().T @ matmul.weight.double())
    h, d_weight = random(terms, 256).to(dtype), torch.empty(rows, 256, device=DEVICE)
    for dz_ in (padded(rows, terms, dtype, torch.nan).copy_(dz.T), dz.T.contiguous()):
        matmul.add_weight_grad(dz_, h, out=d_weight, beta=0)
        assert close(d_weight, dz.double().T @ h.double())


OUT_OF_RANGE = """
import torch
from mssr_kernels import linear_logprob_entropy
h, w = torch.randn(8, 256, device="{device}").bfloat16(), torch.randn(5000, 256, device="{device}").bfloat16()
target = torch.zeros(8, dtype=torch.int64, device="{device}")
target[3] = {target}
out = linear_logprob_entropy(h, w, target, backend="{backend}")
torch.cuda.synchronize()
print("finished", out.logp.isfinite().all().item())
"""


@pytest.mark.parametrize("backend, target", [("triton", 4999), ("triton", 5000), ("triton", -1), ("chunked", 5000)])
def test_a_target_out_of_range_is_a_device_side_assertion(backend, target):
    """Runs in a separate process, because after the assertion a process can no longer use the device."""
    code = OUT_OF_RANGE.format(device=DEVICE, target=target, backend=backend)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    if target == 4999:
        assert done.returncode == 0 and "finished True" in done.stdout, done.stderr[-2000:]
    else:
        assert done.returncode != 0 and "finished" not in done.stdout
        assert "device-side assert" in done.stderr or "outside [0, 5000)" in done.stderr, done.stderr[-2000:]


def policy(hidden, weight, target, advantage, old_logp):
    result = linear_policy_loss(
        hidden * 2, weight, target, advantage, old_logp, normalizer=7.0, config=PolicyLossConfig(entropy_coef=0.1)
    )
    return result.loss * 3 + 1, result.logp, result.entropy, result.clipped, *result.metrics


def scores(hidden, weight, target, advantage, old_logp):
    logp, entropy, lse = linear_logprob_entropy(hidden * 2, weight, target, temperature=0.7)
    return (logp * advantage).sum() + entropy.mean() + lse.sum(), logp, entropy, lse


@pytest.mark.parametrize("function", [policy, scores])
def test_inductor_compiles_a_caller_without_a_break(function):
    hidden, weight, target = problem(200, D, V)
    hidden = hidden.nan_to_num(0)
    rows = random(200), -torch.rand(200, device=DEVICE)
    results = []
    for call in (function, torch.compile(function, fullgraph=True)):
        for _ in range(2):
            leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight)]
            values = call(*leaves, target, *rows)
            values[0].backward()
        results.append([*(value.detach() for value in values), *(leaf.grad for leaf in leaves)])
    for eager, compiled in zip(*results):
        torch.testing.assert_close(compiled, eager, rtol=1.6e-2, atol=1e-3)


def test_gradient_scaler_under_fp16_autocast():
    hidden, weight, target = problem(200, D, V, torch.float32)
    hidden, advantage = hidden.nan_to_num(0), random(200)
    plain = [t.half().float().requires_grad_() for t in (hidden, weight)]
    linear_policy_loss(*plain, target, advantage, backend="reference").loss.backward()
    scaled = [t.detach().clone().requires_grad_() for t in (hidden, weight)]
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**16)
    with torch.autocast(DEVICE, torch.float16):
        loss = linear_policy_loss(*scaled, target, advantage).loss
    assert loss.dtype == torch.float32
    scaler.scale(loss).backward()
    scaler.unscale_(torch.optim.SGD(scaled, lr=0.0))
    for got, want in zip(scaled, plain):
        assert got.grad.dtype == torch.float32
        assert (got.grad - want.grad).norm() <= 2e-3 * want.grad.norm()


@pytest.mark.parametrize("backend", ["triton", "chunked"])
def test_another_stream(backend):
    inputs, coefficients = problem(300, D, V), random(3, 300)
    rows = policy_rows(score(coefficients, *inputs, backend=backend)[0][0])
    wanted = (
        score(coefficients, *inputs, backend=backend),
        learn(rows, *inputs, backend=backend, vocab_drop_tol=2.0**-8),
    )
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # what runs on the default stream by mistake runs too early
        late = [t.clone() for t in inputs]
        found = score(coefficients, *late, backend=backend), learn(rows, *late, backend=backend, vocab_drop_tol=2.0**-8)
    torch.cuda.current_stream().wait_stream(stream)
    for a, b in zip((*found[0][0], *found[1][0][:5]), (*wanted[0][0], *wanted[1][0][:5])):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for a, b in zip((*found[0][1][:2], *found[1][1][:2]), (*wanted[0][1][:2], *wanted[1][1][:2])):
        assert (a.float() - b.float()).norm() <= 4e-3 * b.float().norm()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
@pytest.mark.parametrize("backend", ["triton", "chunked"])
def test_a_device_that_is_not_the_current_one(backend):
    inputs, coefficients = problem(300, D, V), random(3, 300)
    rows = policy_rows(score(coefficients, *inputs, backend=backend)[0][0])
    other = torch.device("cuda", 1)
    there = [t.to(other) for t in inputs]
    assert torch.cuda.current_device() == 0
    (a, grads_a), (b, grads_b) = (
        score(coefficients, *inputs, backend=backend), score(coefficients.to(other), *there, backend=backend)
    )  # fmt: skip
    rows_there = {name: value.to(other) for name, value in rows.items()}
    (c, grads_c), (d, grads_d) = learn(rows, *inputs, backend=backend), learn(rows_there, *there, backend=backend)
    for here, away in zip((*a, *c[:5]), (*b, *d[:5])):
        torch.testing.assert_close(away.to(here.device), here, rtol=1e-5, atol=1e-5)
    for here, away in zip((*grads_a[:2], *grads_c[:2]), (*grads_b[:2], *grads_d[:2])):
        assert (
            away.device == other and (away.to(here.device).float() - here.float()).norm() <= 4e-3 * here.float().norm()
        )


class Model(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.embed = nn.Embedding(V, D)
        nn.init.normal_(self.embed.weight, std=0.05)
        self.lm_head = nn.Linear(D, V, bias=not tied)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, tokens, *arguments, **keywords):
        return self.lm_head(self.embed(tokens).tanh(), *arguments, **keywords)


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_in_a_model(tied):
    model = Model(tied).to(DEVICE, torch.bfloat16)
    tokens, target = torch.randint(V, (2, 4, 33), device=DEVICE)
    advantage = random(4, 33)
    logits = model(tokens)
    logp = logits.float().log_softmax(2).gather(2, target[..., None])[..., 0]
    (-(logp - logp.detach()).exp() * advantage).mean().backward()
    wanted = {name: parameter.grad.float() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.lm_head = FusedLMHead.from_linear(model.lm_head)
    assert torch.equal(model(tokens), logits)
    result = model(tokens, target, advantage, config=PolicyLossConfig(entropy_alpha=0.0))
    result.loss.backward()
    torch.testing.assert_close(result.logp.view(4, 33), logp.detach(), rtol=0, atol=0.05)  # eager's logits are bf16
    for name, parameter in model.named_parameters():
        assert (parameter.grad.float() - wanted[name]).norm() <= 2e-2 * wanted[name].norm(), name


def test_auto_is_triton_in_16_bits():
    for d, v in HEADS.values():
        for dtype, backend in ((torch.bfloat16, "triton"), (torch.float16, "triton"), (torch.float32, "chunked")):
            assert explain(64, d, v, dtype=dtype, device="cuda").backend == backend
