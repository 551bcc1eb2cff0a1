"""A vocabulary split over two gloo ranks gives the same results as one rank with all of it."""

import pytest
import torch
import torch.distributed as dist

from mssr_kernels import PolicyLossConfig, linear_logprob_entropy, linear_policy_loss

N, D, V = 130, 24, 1100
CUTS = [0, 700, V]  # unequal shards


def inputs(dtype=torch.float32):
    torch.manual_seed(7)
    weight = torch.randn(V, D)
    target = torch.randint(V, (N,))
    target[:3] = torch.tensor([0, 699, 700])
    target[5::9] = -100
    hidden = torch.randn(N, D) / D**0.5 + 30 * weight[target.clamp(min=0)] / D
    hidden[5] = torch.nan
    rows = dict(advantage=torch.randn(N), old_logp=-torch.rand(N), ref_logp=-torch.rand(N))
    return hidden.to(dtype), weight.to(dtype), torch.randn(V).to(dtype), target, rows


def scores(world, backend, dtype, whole=False):
    """Return values and gradients of both functions on this rank's shard of the vocabulary (or on all of it)."""
    hidden, weight, bias, target, rows = inputs(dtype)
    shard = slice(0, V) if whole else slice(*CUTS[world.rank : world.rank + 2])
    options = dict(
        temperature=0.8,
        softcap=40.0,
        backend=backend,
        group=None if whole else dist.group.WORLD,
        workspace_bytes=1 << 18,
    )
    found = {}
    for name in ("logprob_entropy", "policy_loss", "policy_loss_sparse"):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight[shard], bias[shard])]
        if name == "logprob_entropy":
            values = linear_logprob_entropy(leaves[0], leaves[1], target, bias=leaves[2], **options)
            loss = (values.logp * rows["advantage"] + values.entropy).sum()
        else:
            config = PolicyLossConfig(kl_coef=0.1, entropy_coef=0.05)
            result = linear_policy_loss(
                leaves[0], leaves[1], target, **rows, bias=leaves[2], config=config,
                vocab_drop_tol=2.0**-12 if name.endswith("sparse") else None, **options,
            )  # fmt: skip
            values, loss = result[:5], result.loss
        loss.backward()
        found[name] = [value.detach() for value in values], [leaf.grad for leaf in leaves]
    return found


@pytest.mark.parametrize(
    "backend,dtype",
    [("chunked", torch.float32), ("chunked", torch.bfloat16), ("chunked", torch.float64), ("triton", torch.float32)],
)
def test_two_ranks_equal_one(ranks, backend, dtype):
    one = scores(None, backend, dtype, whole=True)
    two = ranks(scores, backend, dtype)
    gradient_tolerance = {torch.float32: 3e-5, torch.bfloat16: 1e-2, torch.float64: 1e-12}[dtype]
    for name, (values, gradients) in one.items():
        for a, b, c in zip(values, *(rank[name][0] for rank in two)):
            assert torch.equal(b, c)  # the same bits on every rank
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
        whole_hidden, whole_weight, whole_bias = gradients
        assert torch.equal(two[0][name][1][0], two[1][name][1][0])
        shards = [torch.cat([rank[name][1][index] for rank in two]) for index in (1, 2)]
        tolerance = 2e-3 if name.endswith("sparse") else gradient_tolerance
        for got, want in zip((two[0][name][1][0], *shards), (whole_hidden, whole_weight, whole_bias)):
            assert (got - want).norm() <= max(tolerance, gradient_tolerance) * want.norm()


def out_of_range(world):
    hidden, weight, _, target, _ = inputs()
    shard = slice(*CUTS[world.rank : world.rank + 2])
    errors = []
    for wrong in (V, 2 * V):
        target[4] = wrong
        try:
            linear_logprob_entropy(hidden, weight[shard], target, group=dist.group.WORLD)
        except IndexError as error:
            errors.append(str(error))
    return errors


def test_a_target_is_checked_against_the_whole_vocabulary(ranks):
    for errors in ranks(out_of_range):
        assert len(errors) == 2 and f"target[4] is {V}: outside [0, {V})" in errors[0]


def test_the_reference_does_not_split():
    hidden, weight, _, target, _ = inputs()
    with pytest.raises(ValueError, match="'reference' has the whole vocabulary on every rank"):
        linear_logprob_entropy(hidden, weight, target, group=object(), backend="reference")
