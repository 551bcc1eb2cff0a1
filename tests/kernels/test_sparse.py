"""Mode `sparse` drops a bounded part of every row's gradient, whatever the row, and otherwise equals mode `exact`.

In most tests the weight is the identity, so that hidden states are logits, and their gradients those of the logits.
"""

import math

import kernels_oracle as oracle
import pytest
import torch
from test_work_and_memory import Recorder

from mssr_kernels import PolicyLossConfig, linear_policy_loss
from mssr_kernels.core.statistics import RowStatistics
from mssr_kernels.modes import sparse

V = 2000
PLAIN = PolicyLossConfig(entropy_alpha=0.0)
TOLERANCES = [2.0**-4, 2.0**-7, 2.0**-10, 2.0**-14]


def certain(rows):
    logits = torch.randn(rows, V)
    logits[torch.arange(rows), torch.randint(V, (rows,))] += torch.linspace(14, 40, rows)
    return logits


def forks(rows):
    """A few columns share nearly all of the probability, in unequal parts."""
    logits = torch.randn(rows, V)
    for size in (20.0, 19.0, 17.5, 15.0, 12.0):
        logits[torch.arange(rows), torch.randint(V, (rows,))] += size
    return logits


def flat(rows):
    return 0.01 * torch.randn(rows, V)


def bimodal(rows):
    """One column against all others: the others together hold from 0.5 (first row) to 1e-6 (last row) of the mass."""
    tail = torch.logspace(math.log10(0.5), -6, rows)
    logits = 0.1 * torch.randn(rows, V)
    logits[torch.arange(rows), torch.randint(V, (rows,))] = ((1 - tail) / tail * V).log()
    return logits


def heavy_tail(rows):
    """The k-th largest probability is proportional to k^-s, s from 1 to 3; columns are in random order."""
    order = torch.stack([torch.randperm(V) for _ in range(rows)])
    return -torch.linspace(1, 3, rows)[:, None] * torch.log(order + 1.0)


def crowded_tiles(rows):
    """All of the probability is in 130 adjacent columns: few tiles, each full."""
    logits = torch.full((rows, V), -30.0) + torch.randn(rows, V)
    for row in range(rows):
        start = int(torch.randint(V - 130, ()))
        logits[row, start : start + 130] += 30
    return logits


def extreme(rows):
    return torch.where(torch.rand(rows, V) < 0.002, 80.0, -80.0) + torch.randn(rows, V)


KINDS = [certain, forks, flat, bimodal, heavy_tail, crowded_tiles, extreme]


def gradient_by_logits(logits, target, advantage, tol, config=PLAIN, backend="chunked", **arguments):
    logits = logits.clone().requires_grad_()
    result = linear_policy_loss(
        logits, torch.eye(V, dtype=logits.dtype), target, advantage, config=config, normalizer=1.0, backend=backend,
        vocab_drop_tol=tol, **arguments,
    )  # fmt: skip
    result.loss.backward()
    return logits.grad


def sampled(logits):
    return torch.multinomial(logits.double().softmax(1), 1)[:, 0]


@pytest.mark.parametrize("backend,tol", [*(("chunked", tol) for tol in TOLERANCES), ("triton", TOLERANCES[1])])
@pytest.mark.parametrize(
    "kinds", [*([kind] for kind in KINDS), KINDS], ids=lambda kinds: "+".join(k.__name__ for k in kinds)
)
def test_no_row_drops_more_than_its_tolerance(kinds, backend, tol):
    logits = torch.cat([kind(160 // len(kinds)) for kind in kinds])
    target, advantage = sampled(logits), torch.randn(len(logits))
    got = gradient_by_logits(logits, target, advantage, tol, backend=backend)
    exact = gradient_by_logits(logits.double(), target, advantage, None, backend="reference")
    dropped = (got - exact).abs().sum(1)
    # On-policy the derivative with respect to logp is -A; 3e-6 allows for float32 sums over V columns.
    assert (dropped <= (tol + 3e-6) * advantage.abs()).all(), (dropped / advantage.abs()).max()


@pytest.mark.parametrize("tol", TOLERANCES[:3])
def test_the_bound_covers_an_entropy_gradient(tol):
    logits = torch.cat([kind(24) for kind in KINDS])
    target, advantage = sampled(logits), torch.randn(len(logits))
    config = PolicyLossConfig(entropy_alpha=0.0, entropy_coef=0.7)
    got = gradient_by_logits(logits, target, advantage, tol, config)
    exact = gradient_by_logits(logits.double(), target, advantage, None, config, backend="reference")
    assert ((got - exact).abs().sum(1) <= (tol + 1e-5) * (advantage.abs() + 0.7)).all()
    assert (got[:24] == 0).float().mean() > 0.5  # the peaked rows did drop columns


@pytest.mark.parametrize("kind", [certain, forks])
def test_peaked_rows_cost_a_fraction(kind):
    logits = kind(150)
    target, advantage = sampled(logits), torch.randn(150)
    with Recorder() as recorder:
        gradient_by_logits(logits, target, advantage, 2.0**-8)
    unit = V * V / (16 * 4000)  # one row's product, in the recorder's units
    assert 150 < recorder.work / unit <= 1.5 * 150  # the forward pass, and less than half of dhidden
    with Recorder() as recorder:
        gradient_by_logits(flat(150), target, advantage, 2.0**-8)
    assert recorder.work / unit == pytest.approx(300)  # as in mode `exact`: forward and dhidden; the weight is frozen


def test_an_improbable_label_is_kept():
    logits = certain(64)
    target = logits.argmin(1)
    got = gradient_by_logits(logits, target, torch.ones(64), 2.0**-6)
    label = got.gather(1, target[:, None])
    torch.testing.assert_close(label, -torch.ones(64, 1), atol=1e-4, rtol=0)
    assert (got == 0).float().mean() > 0.5


@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_sparse_rows_in_several_chunks_and_pieces(backend):
    """Labels are improbable, so that every sparse row has a gradient of about 1. Rows are ignored, so that a row's number is
    not its position in the chunk. The workspace holds a few rows and columns at a time."""
    n, tol, normalizer = 200, 2.0**-8, 50.0
    logits = certain(n)
    target, advantage = logits.argmin(1), torch.randn(n)
    target[::7] = -100
    found = []
    for drop in (None, tol):
        leaves = logits.clone().requires_grad_(), torch.eye(V, requires_grad=True), torch.zeros(V, requires_grad=True)
        linear_policy_loss(
            *leaves[:2], target, advantage, bias=leaves[2], config=PLAIN, normalizer=normalizer, vocab_drop_tol=drop,
            backend=backend, workspace_bytes=2 << 20,
        ).loss.backward()  # fmt: skip
        found.append([leaf.grad for leaf in leaves])
    exact, sparse = found
    assert ((exact[0] - sparse[0]).abs().sum(1) <= (tol + 1e-5) * advantage.abs() / normalizer).all()
    assert (sparse[0] == 0).float().mean() > 0.5
    for a, b in zip(exact[1:], sparse[1:]):
        assert (a - b).norm() <= 1e-2 * a.norm()


class TwoRows:
    """Tiles of two rows. Row 0 needs ten columns. Row 1 needs all columns, or (covered) only its label."""

    def __init__(self, covered: bool):
        self.covered = covered

    def tile_mass(self, statistics):
        return torch.tensor([[1.0, 1.0], [0, 0], [0, 0], [0, 0]])

    def first_ranks(self, cut, ranks, statistics):
        return torch.tensor([0] * 10 + ([2] if self.covered else [1]) * 1990)

    def dropped_mass(self, active, statistics):
        return torch.zeros(2)


def test_rows_beyond_the_split_are_dense(monkeypatch):
    """Even if the chosen columns drop little enough of their mass: their label may not be among these columns."""
    monkeypatch.setattr(sparse, "GATHER_ROWS", {"cpu": 0})
    rows, target, tolerance = torch.arange(2), torch.tensor([3, 1999]), torch.full((2,), 0.01)
    chosen = sparse.choose(TwoRows(covered=False), rows, target, None, tolerance)
    assert chosen.columns.tolist() == list(range(10))
    assert chosen.sparse_rows.tolist() == [0] and chosen.dense_rows.tolist() == [1]
    chosen = sparse.choose(TwoRows(covered=True), rows, target, None, tolerance)
    assert chosen.columns.tolist() == [*range(10), 1999]
    assert chosen.sparse_rows.tolist() == [0, 1] and chosen.dense_rows.tolist() == []
    monkeypatch.setattr(sparse, "GATHER_ROWS", {"cpu": 400})  # 4010 against 2 x 2000: not worth it
    assert sparse.choose(TwoRows(covered=True), rows, target, None, tolerance) is None


@pytest.mark.parametrize("tol", [0.5, 2.0**-4, 2.0**-14])
@pytest.mark.parametrize("vocab", [50, 152064])
def test_the_mass_allowed_beside_an_entropy_gradient(tol, vocab):
    """The allowed mass delta has delta (H + log V - log delta) <= tolerance, and not much less."""
    entropy = torch.linspace(0, math.log(vocab), 20)
    statistics = RowStatistics(entropy, entropy, entropy, entropy)
    delta = sparse.row_tolerance(tol, statistics, True, vocab).double()
    used = delta * (entropy + math.log(vocab) - delta.log())
    assert (used <= tol * (1 + 1e-6)).all() and (used >= 0.99 * tol).all() and (delta <= tol).all()
    assert (sparse.row_tolerance(tol, statistics, False, vocab) == tol).all()


def everything():
    """Return arguments that use every option, for rows of all kinds and a weight near the identity."""
    torch.manual_seed(5)
    n = 20 * len(KINDS)
    hidden = torch.cat([kind(20) for kind in KINDS])
    target = sampled(hidden)
    target[::11] = -100
    hidden[::11] = math.nan
    bias = torch.randn(V)
    bias[torch.randperm(V)[:300]] = -math.inf
    bias[target[target >= 0]] = 0.5
    rows = dict(
        old_logp=-torch.rand(n) * 3, ref_logp=-torch.rand(n) * 3, rollout_logp=-torch.rand(n) * 3, normalizer=50.0,
        temperature=0.5 + torch.rand(n), softcap=50.0,
        config=PolicyLossConfig(kl_coef=0.1, entropy_coef=0.05, tis_cap=2.0),
    )  # fmt: skip
    return hidden, torch.eye(V) + 0.001 * torch.randn(V, V), target, torch.randn(n), bias, rows


@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_with_every_option_the_gradients_are_near_and_the_values_the_same(backend):
    hidden, weight, target, advantage, bias, rows = everything()
    results = {}
    for tol in (None, 0.0, 2.0**-12):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
        result = linear_policy_loss(
            leaves[0],
            leaves[1],
            target,
            advantage,
            bias=leaves[2],
            vocab_drop_tol=tol,
            backend=backend,
            workspace_bytes=1 << 20,
            **rows,
        )
        result.loss.backward()
        results[tol] = result, [leaf.grad for leaf in leaves]
    exact, gradients = results[None]
    for other, _ in results.values():  # chunk sizes may differ, which changes only the rounding of a BLAS
        tolerance = 0 if backend == "triton" else 1e-5
        torch.testing.assert_close(exact[1:5], other[1:5], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(exact.loss, other.loss, rtol=1e-6, atol=1e-6)
    for a, b, c in zip(gradients, *(results[tol][1] for tol in (0.0, 2.0**-12))):
        assert torch.equal(a, b) and c.isfinite().all()
        assert (a - c).norm() <= 2e-3 * a.norm()
        assert not torch.equal(a, c)


def test_against_the_oracle_with_a_weight_gradient():
    n, d, v = 96, 256, 1500
    weight = torch.randn(v, d)
    target = torch.randint(v, (n,))
    hidden = torch.randn(n, d) / d**0.5 + (20 * weight[target] + 19 * weight[torch.randint(v, (n,))]) / d
    advantage = torch.randn(n)
    _, expected = oracle.gradients64(oracle.policy_loss, hidden, weight, target, advantage, config=PLAIN)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    linear_policy_loss(*leaves, target, advantage, config=PLAIN, vocab_drop_tol=2.0**-12).loss.backward()
    for leaf, reference in zip(leaves, expected):
        assert (leaf.grad - reference).norm() <= 1e-3 * reference.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_is_no_less_exact_than_16_bit_eager(dtype):
    n, d, v = 128, 256, 3000
    weight = torch.randn(v, d).to(dtype)
    target = torch.randint(v, (n,))
    hidden = (
        torch.randn(n, d) / d**0.5 + (24 * weight[target].float() + 23 * weight[torch.randint(v, (n,))].float()) / d
    )
    hidden, advantage = hidden.to(dtype), torch.randn(n)
    _, exact = oracle.gradients64(oracle.policy_loss, hidden, weight, target, advantage, config=PLAIN)
    errors = []
    for tol in (None, 2.0**-8):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if tol is None:
            logp = torch.log_softmax((leaves[0] @ leaves[1].T).float(), 1).gather(1, target[:, None])[:, 0]
            loss = -((logp - logp.detach()).exp() * advantage).mean()
        else:
            loss = linear_policy_loss(*leaves, target, advantage, config=PLAIN, vocab_drop_tol=tol).loss
        loss.backward()
        errors.append([(leaf.grad.double() - want).norm() for leaf, want in zip(leaves, exact)])
    assert all(theirs >= ours for theirs, ours in zip(*errors))


@pytest.mark.parametrize("tol", [-0.1, 1.0, math.nan])
def test_the_tolerance_is_a_probability(tol):
    with pytest.raises(ValueError, match="vocab_drop_tol must be a probability"):
        gradient_by_logits(flat(2), torch.tensor([0, 1]), torch.ones(2), tol)
