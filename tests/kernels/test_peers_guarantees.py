"""What cut-cross-entropy 25.1 and liger-kernel 0.8 promise for a fused head also holds for ours, on the same inputs.

The packages themselves are the oracles, where they run on a CPU:

cce        `cut_cross_entropy.linear_cross_entropy(impl="torch_compile")`, its arithmetic with the compiler off (compiling
           takes longer than this whole file). README and docstring: the loss is F.cross_entropy((e @ c.T).float(), targets)
           for any leading dimensions; `ignore_index`; `softcap`; `shift` predicts the next token; reduction "none" has zeros
           for ignored targets and gives perplexity.
scaled     `LigerFusedLinearScaledCrossEntropyFunction`, its PyTorch fallback. README: float32 loss and differentiable
           entropy per token, temperature, rows whose target equals ignore_index contribute zero outputs and gradients.
fused      `LigerFusedLinearCrossEntropyLoss`, its Triton kernel under the interpreter: ignore_index, bias, reductions.

Not run: cut-cross-entropy's own kernels and Liger's softcap, which the interpreter cannot execute (libdevice, casts of
numbers); Liger's CuTe and cuTile kernels (they need a GPU). cut-cross-entropy 25.1 has no bias, and only its kernels have
`filter_eps`; our counterpart, whose error is bounded for every row, is tested in test_sparse.

Where the packages fail and we do not, float64 is the oracle: NaN in an ignored row makes all of Liger's gradient of the
weight NaN, and the mean of a batch without targets is NaN in cut-cross-entropy.
"""

import math

import kernels_oracle as oracle
import pytest
import torch
from cut_cross_entropy import linear_cross_entropy
from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction
from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

from mssr_kernels import FusedLMHead, PolicyLossConfig, linear_logprob_entropy, linear_policy_loss

BACKENDS = ("chunked", "triton")
VOCABULARIES = (130, 1000, 2049)  # less than a block, no multiple of one, one column more than a multiple
ON_POLICY = PolicyLossConfig(entropy_alpha=0.0)  # with advantage 1: the gradient of cross entropy


@pytest.fixture(autouse=True)
def _no_compiler():
    with torch.compiler.set_stance("force_eager"):
        yield


def cce(hidden, weight, target, **options):
    return linear_cross_entropy(hidden, weight, target, impl="torch_compile", **options)


def scaled(hidden, weight, target, temperature=1.0, ignore_index=-100):
    return LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, target, temperature, ignore_index, 1, True)


def make(n, v, d=24, dtype=torch.float32):
    """Return hidden states, weight and labels; some labels are ignored, one is the last column."""
    hidden, weight, target = torch.randn(n, d), 0.5 * torch.randn(v, d), torch.randint(v, (n,))
    target[0], target[1], target[3::5] = v - 1, 0, -100
    return hidden.to(dtype), weight.to(dtype), target


def gradients(function, *leaves):
    """Return [value, *gradients] of a scalar function."""
    leaves = [None if leaf is None else leaf.detach().clone().requires_grad_() for leaf in leaves]
    value = function(*leaves)
    value.backward()
    return [value.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]


def agree(ours, theirs, rtol=1e-4, atol=1e-5):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.to(b.dtype), b, rtol=rtol, atol=atol)


def ours(hidden, weight, target, **options):
    return -linear_logprob_entropy(hidden, weight, target, **options).logp


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_cross_entropy_with_softcap_as_cce(vocab, softcap, backend):
    hidden, weight, target = make(33, vocab)
    upstream = torch.randn(33)
    agree(
        gradients(lambda h, w: (ours(h, w, target, softcap=softcap, backend=backend) * upstream).sum(), hidden, weight),
        gradients(lambda h, w: (cce(h, w, target, softcap=softcap, reduction="none") * upstream).sum(), hidden, weight),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_mean_loss_of_cce_is_a_policy_loss_of_advantage_one(backend):
    """Their mean is over the targets that are not ignored, as with our default normalizer."""
    hidden, weight, target = make(33, 1000)

    def policy(h, w):
        return linear_policy_loss(h, w, target, torch.ones(33), config=ON_POLICY, softcap=4.0, backend=backend).loss

    agree(  # not the value: where the ratio is 1, ours is -1
        gradients(policy, hidden, weight)[1:],
        gradients(lambda h, w: cce(h, w, target, softcap=4.0), hidden, weight)[1:],
    )


@pytest.mark.parametrize("ignore_index", [-1, 7])
def test_any_ignore_index_as_cce_and_liger(ignore_index):
    hidden, weight, target = make(20, 130)
    target[target == -100] = ignore_index
    target[5] = 8
    upstream = torch.randn(2, 20)

    def mine(h, w):
        out = linear_logprob_entropy(h, w, target, ignore_index=ignore_index, temperature=0.7)
        return (torch.stack([-out.logp, out.entropy]) * upstream).sum()

    def ligers(h, w):
        return (torch.stack(scaled(h, w, target, 0.7, ignore_index)) * upstream).sum()

    agree(gradients(mine, hidden, weight), gradients(ligers, hidden, weight))
    agree(
        [ours(hidden, weight, target, ignore_index=ignore_index)],
        [cce(hidden, weight, target, ignore_index=ignore_index, reduction="none")],
    )


def test_shift_as_cce():
    """Here, slices replace their shift=True: rows need not be contiguous."""
    hidden, weight, labels = torch.randn(3, 9, 24), torch.randn(130, 24), torch.randint(130, (3, 9))
    labels[0, :4], labels[2, -1] = -100, -100

    def mine(h, w):
        head = FusedLMHead(24, 130, bias=False, device="meta")
        del head.weight
        head.weight = w
        return -head(h[:, :-1], labels[:, 1:]).logp.sum() / (labels[:, 1:] != -100).sum()

    agree(gradients(mine, hidden, weight), gradients(lambda h, w: cce(h, w, labels, shift=True), hidden, weight))


def test_perplexity_as_in_the_readme_of_cce():
    hidden, weight, labels = torch.randn(3, 9, 24), 0.3 * torch.randn(130, 24), torch.randint(130, (3, 9))
    labels[1, 5:] = -100
    head = FusedLMHead(24, 130, bias=False)
    head.weight.data = weight
    counts = (labels[:, 1:] != -100).sum(1)
    theirs = torch.exp(cce(hidden, weight, labels, shift=True, reduction="none").sum(1) / counts).mean()
    nll = -head(hidden[:, :-1], labels[:, 1:]).logp.view(3, 8)
    torch.testing.assert_close(torch.exp(nll.sum(1) / counts).mean(), theirs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_log_probs_and_entropy_as_liger(vocab, temperature, backend):
    hidden, weight, target = make(33, vocab)
    upstream = torch.randn(2, 33)

    def mine(h, w):
        out = linear_logprob_entropy(h, w, target, temperature=temperature, backend=backend)
        return (torch.stack([-out.logp, out.entropy]) * upstream).sum()

    def ligers(h, w):
        return (torch.stack(scaled(h, w, target, temperature)) * upstream).sum()

    agree(gradients(mine, hidden, weight), gradients(ligers, hidden, weight), atol=3e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocab", [130, 1000])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_bias_and_reductions_as_ligers_triton_kernel(reduction, vocab, backend):
    hidden, weight, target = make(17, vocab)
    bias, upstream = torch.randn(vocab), torch.randn(17)

    def mine(h, w, b):
        nll = ours(h, w, target, bias=b, backend=backend)
        return {"mean": nll.sum() / (target != -100).sum(), "sum": nll.sum(), "none": (nll * upstream).sum()}[reduction]

    def ligers(h, w, b):
        loss = LigerFusedLinearCrossEntropyLoss(reduction=reduction)(w, h, target, b)
        return (loss * upstream).sum() if reduction == "none" else loss

    agree(gradients(mine, hidden, weight, bias), gradients(ligers, hidden, weight, bias))


@pytest.mark.parametrize("peer", ["cce", "scaled", "fused"])
def test_a_tied_head_collects_both_gradients_as_theirs(peer):
    tokens, target = torch.randint(130, (31,)), torch.randint(130, (31,))
    target[::4] = -100
    embedding = torch.randn(130, 24)

    def mine(e):
        model = torch.nn.Embedding(130, 24, _weight=e.detach())
        head = FusedLMHead(24, 130, bias=False)
        head.weight = model.weight
        loss = -head(model(tokens).tanh(), target).logp.sum()
        loss.backward()
        return [loss.detach(), model.weight.grad]

    def theirs(e):
        hidden = torch.nn.functional.embedding(tokens, e).tanh()
        if peer == "cce":
            return cce(hidden, e, target, reduction="sum")
        if peer == "scaled":
            return scaled(hidden, e, target)[0].sum()
        return LigerFusedLinearCrossEntropyLoss(reduction="sum")(e, hidden, target)

    agree(mine(embedding), gradients(theirs, embedding))


@pytest.mark.parametrize("layout", ["expanded", "strided", "transposed weight", "strided target"])
def test_inputs_of_any_strides_as_theirs(layout):
    hidden, weight, target = make(30, 130)
    if layout == "expanded":
        hidden = hidden[:1].expand(30, 24)
    elif layout == "strided":
        hidden = torch.randn(24, 60).T[::2]
    elif layout == "transposed weight":
        weight = torch.randn(24, 130).T
    else:
        target = torch.stack([target, target], 1)[:, 0]
    h, w = hidden.requires_grad_(), weight.requires_grad_()  # the layout itself, not a copy
    found = torch.autograd.grad(ours(h, w, target).sum(), (h, w))
    agree(found, torch.autograd.grad(cce(h, w, target, reduction="sum"), (h, w)))
    agree(found, torch.autograd.grad(scaled(h, w, target)[0].sum(), (h, w)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_an_ignored_row_may_hold_anything(poison, backend):
    """cut-cross-entropy also leaves ignored rows out; Liger multiplies them by zero."""
    hidden, weight, target = make(20, 130)
    ignored = target == -100
    poisoned = hidden.masked_fill(ignored[:, None], poison)
    value, expected = oracle.gradients64(
        lambda h, w, bias: -oracle.logprob_entropy(h, w, target)[0].sum(), hidden, weight
    )
    found = gradients(lambda h, w: ours(h, w, target, backend=backend).sum(), poisoned, weight)
    agree(found, [value.float(), *(grad.float() for grad in expected[:2])])
    agree(found, gradients(lambda h, w: cce(h, w, target, reduction="sum"), poisoned, weight))
    assert (found[1][ignored] == 0).all()
    for peer in (
        lambda h, w: scaled(h, w, target)[0].sum(),
        lambda h, w: LigerFusedLinearCrossEntropyLoss(reduction="sum")(w, h, target),
    ):  # if this fails, Liger has fixed it: update the file's docstring
        assert gradients(peer, poisoned, weight)[2].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_without_targets_is_zero_as_ligers(backend):
    hidden, weight, _ = make(20, 130)
    target = torch.full((20,), -100)

    def policy(h, w):
        return linear_policy_loss(h, w, target, torch.ones(20), config=ON_POLICY, backend=backend).loss

    found = gradients(policy, hidden, weight)
    assert all((value == 0).all() for value in found)
    agree(found, gradients(lambda h, w: LigerFusedLinearCrossEntropyLoss()(w, h, target), hidden, weight), atol=0)
    agree(found, gradients(lambda h, w: sum(x.sum() for x in scaled(h, w, target)), hidden, weight), atol=0)
    assert cce(hidden, weight, target).isnan()


def test_a_frozen_head_gets_no_gradient_as_ligers():
    hidden, weight, target = make(20, 130)
    found = gradients(lambda h: ours(h, weight, target).sum(), hidden)
    agree(found, gradients(lambda h: scaled(h, weight, target)[0].sum(), hidden))
    agree(found, gradients(lambda h: LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, h, target), hidden))
    assert weight.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_is_no_less_exact_than_theirs(backend):
    """Errors of loss, entropy and gradients against float64 are at most those of every peer that computes them."""
    hidden, weight, target = make(64, 1000, d=48, dtype=torch.bfloat16)
    _, expected = oracle.gradients64(lambda h, w, bias: -oracle.logprob_entropy(h, w, target)[0].sum(), hidden, weight)
    exact = oracle.logprob_entropy(hidden.double(), weight.double(), target)

    def errors(loss_of):
        nll = loss_of(hidden, weight)
        _, *grads = gradients(lambda h, w: loss_of(h, w).sum(), hidden, weight)
        pairs = zip([nll, *grads], [-exact[0], *expected[:2]])
        return [(a.double() - b).norm().item() for a, b in pairs]

    mine = errors(lambda h, w: ours(h, w, target, backend=backend))
    for peer in (
        lambda h, w: cce(h, w, target, reduction="none"),
        lambda h, w: scaled(h, w, target)[0],
        lambda h, w: LigerFusedLinearCrossEntropyLoss(reduction="none")(w, h, target),
    ):
        for a, b in zip(mine, errors(peer)):
            assert a <= b + 1e-6
    entropy = linear_logprob_entropy(hidden, weight, target, backend=backend).entropy
    theirs = scaled(hidden, weight, target)[1]
    assert (entropy - exact[1]).norm() <= (theirs - exact[1]).norm()


@pytest.mark.parametrize("wrong", [-1, 130])
def test_a_target_outside_of_the_vocabulary_is_refused_as_by_liger(wrong):
    hidden, weight, target = make(9, 130)
    target[2] = wrong
    with pytest.raises(ValueError, match="outside"):
        scaled(hidden, weight, target)
    with pytest.raises(IndexError, match=rf"target\[2\] is {wrong}"):
        ours(hidden, weight, target)
