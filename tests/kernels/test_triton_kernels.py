"""The Triton kernels, run by Triton's interpreter, against float64 and against their counterparts in PyTorch.

Triton decides at import whether a kernel is interpreted. Without TRITON_INTERPRET=1 at that time, these tests are skipped.
"""

import pytest
import torch

from mssr_kernels.backends.matmul import HeadMatmul, padded
from mssr_kernels.backends.torch.tiles import TorchTiles
from mssr_kernels.backends.triton import tuning
from mssr_kernels.core.inputs import HeadInputs
from mssr_kernels.core.statistics import UpstreamGradient, row_gradient, row_statistics, take

pytest.importorskip("triton")  # not available on every platform
from mssr_kernels.backends.triton import forward, logits_tile, slab
from mssr_kernels.backends.triton.tiles import TritonTiles

# The interpreter uses NumPy, which warns of intended values (log 0, rows of NaN) and of columns that are never stored.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.skipif(not logits_tile.INTERPRETED, reason="needs TRITON_INTERPRET=1"),
]
DTYPES = [torch.float32, torch.bfloat16]


def problem(rows, vocab, width, dtype=torch.float32, scale=1.0):
    """Return hidden states, weight and labels; `scale` is about the standard deviation of the logits."""
    h = torch.randn(rows, width).to(dtype)
    weight = (torch.randn(vocab, width) * scale / width**0.5).to(dtype)
    target = torch.randint(vocab, (rows,))
    target[-1] = vocab - 1
    return h, weight, target


def oracle(h, weight, target, bias=None, temperature=1.0, softcap=None):
    """Return (z [N, V], max, log_sum, logp, entropy) in float64."""
    z = h.double() @ weight.double().T
    if bias is not None:
        z = z + bias.double()
    if softcap is not None:
        z = torch.tanh(z / softcap) * softcap
    z = z / (temperature.double()[:, None] if isinstance(temperature, torch.Tensor) else temperature)
    log_p = z.log_softmax(1)
    entropy = -(log_p.exp() * log_p.clamp(min=-1e4)).sum(1)
    return z, z.amax(1), torch.logsumexp(z, 1) - z.amax(1), log_p.gather(1, target[:, None])[:, 0], entropy


def check_statistics(h, weight, target, bias=None, temperature=1.0, softcap=None, tolerance=2e-5):
    sums = forward.statistics(h, weight, bias, target, temperature, softcap)
    found = row_statistics(sums)
    for value, wanted in zip(found, oracle(h, weight, target, bias, temperature, softcap)[1:]):
        torch.testing.assert_close(value.double(), wanted, atol=tolerance, rtol=2e-6)
    assert (found.logp <= 0).all() and (found.entropy >= 0).all()
    return sums


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, vocab, width", [(1, 1000, 37), (7, 1000, 64), (129, 1000, 72), (1, 5, 3)])
def test_statistics(rows, vocab, width, dtype):
    check_statistics(*problem(rows, vocab, width, dtype, scale=3.0))


def test_statistics_of_many_tiles():
    """There are more tiles than parts; the last tile has 7 columns."""
    check_statistics(*problem(7, 32007, 64, torch.bfloat16, scale=3.0))


@pytest.mark.parametrize("shape", ["peaked", "flat", "all_negative", "plus_minus_80"])
def test_statistics_of_extreme_rows(shape):
    h, weight, target = problem(33, 777, 64)
    if shape == "peaked":
        h = weight[target] * 300
    elif shape == "flat":
        h = torch.zeros_like(h)
    elif shape == "all_negative":
        h[:, 0], weight[:, 0], h[:, 1:] = 16, -10, h[:, 1:] * 0.1
    else:
        h, weight = h.sign() * 10, weight.sign() / 8
    check_statistics(h, weight, target, tolerance=2e-4)  # sums of products near 160


def test_bias_temperature_and_softcap():
    h, weight, target = problem(40, 1000, 72, scale=20.0)
    bias, temperature = torch.randn(1000), torch.rand(40) + 0.5
    check_statistics(h, weight, target, bias=bias)
    check_statistics(h, weight, target, temperature=0.7)
    check_statistics(h, weight, target, temperature=temperature)
    check_statistics(h, weight, target, softcap=15.0)
    check_statistics(h, weight, target, bias, temperature, 15.0)
    number = forward.statistics(h, weight, None, target, 0.7, None)
    tensor = forward.statistics(h, weight, None, target, torch.full((40,), 0.7), None)
    assert all(map(torch.equal, number, tensor))


def test_masked_columns():
    """A bias of -inf masks some columns, all columns of the first tiles, or a label."""
    h, weight, target = problem(9, 1000, 64)
    bias = torch.zeros(1000)
    bias[:300] = bias[500:510] = -torch.inf
    target.clamp_(min=600)
    check_statistics(h, weight, target, bias=bias)
    target[0] = 3
    assert row_statistics(forward.statistics(h, weight, bias, target, 1.0, None)).logp[0] == -torch.inf


def test_nan_stays_in_its_row():
    h, weight, target = problem(5, 300, 64)
    clean = row_statistics(forward.statistics(h, weight, None, target, 1.0, None))
    h[2, 7] = torch.nan
    found = row_statistics(forward.statistics(h, weight, None, target, 1.0, None))
    others = torch.tensor([0, 1, 3, 4])
    for name in ("logp", "entropy", "lse"):
        assert getattr(found, name)[2].isnan()
        assert torch.equal(getattr(found, name)[others], getattr(clean, name)[others])


def test_a_label_elsewhere_has_logit_minus_infinity():
    h, weight, target = problem(4, 300, 64)
    target[:3] = torch.tensor([-100, 300, 2**40])
    label = forward.statistics(h, weight, None, target, 1.0, None).label
    assert (label[:3] == -torch.inf).all() and label[3].isfinite()


def test_no_rows():
    h, weight, target = problem(4, 300, 64)
    sums = forward.statistics(h[:0], weight, None, target[:0], 1.0, None)
    assert all(field.shape == (0,) for field in sums)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_the_batch_or_on_storing(dtype):
    h, weight, target = problem(70, 1000, 72, dtype, scale=3.0)
    whole = forward.statistics(h, weight, None, target, 0.9, None)
    for rows in (torch.arange(1), torch.arange(33, 70), torch.randperm(70)[:13]):
        subset = forward.statistics(h[rows], weight, None, target[rows], 0.9, None)
        assert all(torch.equal(part, field[rows]) for part, field in zip(subset, whole))
    stored = forward.statistics(h, weight, None, target, 0.9, None, new_store(70, 1000, dtype))
    assert all(map(torch.equal, stored, whole))


def new_store(rows, vocab, dtype):
    tiles = -(-vocab // tuning.INTERPRETER.block_vocab)
    weights = torch.full((vocab, padded(rows)), torch.nan, dtype=dtype)[:, :rows]
    return forward.Store(weights, *torch.full((2, tiles, rows), torch.nan))


def test_tma_descriptors_give_the_bits_of_pointers(monkeypatch):
    h, weight, target = problem(33, 1000, 72, torch.bfloat16, scale=3.0)
    results = []
    for tma in (False, True):
        monkeypatch.setattr(tuning, "INTERPRETER", tuning.INTERPRETER._replace(tma=tma))
        store = new_store(33, 1000, torch.bfloat16)
        results.append([*forward.statistics(h, weight, None, target, 1.0, None, store), *store])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_weights(dtype):
    h, weight, target = problem(19, 1000, 64, dtype, scale=3.0)
    store = new_store(19, 1000, dtype)
    forward.statistics(h, weight, None, target, 1.0, None, store)
    z = oracle(h, weight, target)[0].T
    tile = tuning.INTERPRETER.block_vocab
    for number, columns in enumerate(z.split(tile)):
        torch.testing.assert_close(store.max[number].double(), columns.amax(0), atol=1e-5, rtol=1e-6)
        w = (columns - columns.amax(0)).exp()
        torch.testing.assert_close(store.sum[number].double(), w.sum(0), atol=1e-5, rtol=1e-5)
        # The interpreter truncates to bf16 where the hardware rounds.
        stored = store.weights[number * tile : number * tile + len(columns)].double()
        torch.testing.assert_close(stored, w, atol=1e-6, rtol=1e-5 if dtype == torch.float32 else 2**-7)


def head_of(h, weight, target, bias=None, temperature=1.0, softcap=None):
    return HeadInputs(h, weight, bias, target, temperature, softcap, -100, 256 << 20, None)


def upstream_of(rows, slope):
    return UpstreamGradient(
        torch.randn(rows), torch.randn(rows) if slope else None, torch.randn(rows) if slope else None
    )


@pytest.mark.parametrize("slope", [False, True])
@pytest.mark.parametrize("dtype, softcap, masked", [(torch.float32, 12.0, True), (torch.bfloat16, None, False)])
def test_slab_gradient(dtype, softcap, masked, slope):
    h, weight, target = problem(37, 1000, 72, dtype, scale=5.0)
    temperature, bias = torch.rand(37) + 0.5, torch.randn(1000).to(dtype)
    if masked and softcap is None:
        bias[10:20] = -torch.inf
    upstream = upstream_of(37, slope)
    statistics = row_statistics(forward.statistics(h, weight, bias, target, temperature, softcap))
    gradient = row_gradient(target, statistics, upstream, temperature, softcap)

    x = (h.double() @ weight.double().T + bias.double()).requires_grad_()
    z = (x if softcap is None else torch.tanh(x / softcap) * softcap) / temperature.double()[:, None]
    log_p = z.log_softmax(1)
    total = (upstream.logp.double() * log_p.gather(1, target[:, None])[:, 0]).sum()
    if slope:
        total = total - (upstream.entropy.double() * (log_p.exp() * log_p).sum(1)).sum()
        total = total + (upstream.lse.double() * z.logsumexp(1)).sum()
    wanted = torch.autograd.grad(total, x)[0].T
    for columns in (slice(0, 1000), slice(300, 700), slice(640, None)):
        out = torch.full((len(range(1000)[columns]), padded(37)), torch.nan)[:, :37]
        slab.slab_gradient(h, weight, bias, columns, gradient, temperature, softcap, out)
        torch.testing.assert_close(out.double(), wanted[columns], atol=2e-6, rtol=2e-5)


def test_slab_gradient_of_masked_columns_is_zero():
    h, weight, target = problem(5, 300, 64)
    bias = torch.zeros(300)
    bias[:150] = -torch.inf
    target.clamp_(min=200)
    statistics = row_statistics(forward.statistics(h, weight, bias, target, 1.0, None))
    gradient = row_gradient(target, statistics, upstream_of(5, True), 1.0, None)
    out = torch.full((300, 5), torch.nan)
    slab.slab_gradient(h, weight, bias, slice(0, 300), gradient, 1.0, None, out)
    assert (out[:150] == 0).all() and out.isfinite().all()


class Pair:
    """One chunk, held by `TritonTiles` and by `TorchTiles`."""

    def __init__(self, rows=45, vocab=500, width=40, softcap=None, bias=None, capacity=None, scale=4.0):
        self.h, weight, self.target = problem(rows, vocab, width, scale=scale)
        self.head = head_of(self.h, weight, self.target, bias, 0.8, softcap)
        self.rows, self.vocab = rows, vocab
        matmul = HeadMatmul(weight, torch.float32, 1 << 20)
        self.tiles = [kind(self.head, matmul, capacity or rows) for kind in (TritonTiles, TorchTiles)]
        self.fill()

    def fill(self):
        sums = [tiles.fill(self.h, self.target, 0.8) for tiles in self.tiles]
        self.statistics = row_statistics(sums[0])
        for value, wanted in zip(self.statistics, row_statistics(sums[1])):
            torch.testing.assert_close(value, wanted, atol=1e-5, rtol=1e-5)

    def gradient(self, slope=False):
        return row_gradient(self.target, self.statistics, upstream_of(self.rows, slope), 0.8, self.head.softcap)


@pytest.mark.parametrize("softcap, slope", [(None, False), (None, True), (12.0, False), (12.0, True)])
def test_gradient_of_the_chunk(softcap, slope):
    pair = Pair(softcap=softcap, capacity=64)
    gradient = pair.gradient(slope)
    (found, order), (wanted, _) = (tiles.gradient(None, gradient) for tiles in pair.tiles)
    assert order is None
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=2e-5)
    for rows in (
        torch.tensor([44]),
        torch.arange(0, 45, 3),
        torch.arange(20, 45),
        torch.arange(44),
        torch.arange(45),
    ):
        pair.fill()
        (found, order), (wanted, _) = (tiles.gradient(rows, take(gradient, rows)) for tiles in pair.tiles)
        assert torch.equal(order.sort().values, rows)
        torch.testing.assert_close(found, wanted[:, torch.searchsorted(rows, order)], atol=2e-6, rtol=2e-5)


def test_gradient_of_no_rows():
    pair = Pair(rows=3, vocab=300)
    none = torch.tensor([], dtype=torch.int64)
    dz, order = pair.tiles[0].gradient(none, take(pair.gradient(), none))
    assert dz.shape == (300, 0) and order.shape == (0,)


def test_gradient_where_weights_vanish():
    bias = torch.zeros(500)
    bias[:200] = -torch.inf
    pair = Pair(bias=bias)
    pair.target.clamp_(min=200)
    pair.fill()
    gradient = pair.gradient(slope=True)
    found, _ = pair.tiles[0].gradient(None, gradient)
    assert (found[:200] == 0).all()
    torch.testing.assert_close(found, pair.tiles[1].gradient(None, gradient)[0], atol=2e-6, rtol=2e-5)


def test_what_mode_sparse_asks_for():
    pair = Pair(rows=130, vocab=777, scale=6.0)
    ours, theirs = pair.tiles
    p = (pair.head.hidden @ pair.head.weight.T / 0.8).softmax(1)
    mass = ours.tile_mass(pair.statistics)
    torch.testing.assert_close(mass.sum(0), torch.ones(130))

    cut = p.sort(dim=1, descending=True).values[:, :9].mean(1)  # lies between probabilities, never equal to one of them
    cut[5] = torch.inf
    ranks = torch.randperm(130)
    first = ours.first_ranks(cut, ranks, pair.statistics)
    assert first.dtype == torch.int64 and (first == 130).any() and (first < 130).any()
    assert torch.equal(first, theirs.first_ranks(cut, ranks, pair.statistics))

    active = first < 100
    dropped = ours.dropped_mass(active, pair.statistics)
    torch.testing.assert_close(dropped, (p * ~active).sum(1), atol=1e-6, rtol=1e-5)
    assert (ours.dropped_mass(torch.ones_like(active), pair.statistics) == 0).all()

    rows = torch.arange(1, 130, 2)
    active[pair.target[rows]] = True
    columns = active.nonzero()[:, 0]
    for slope in (False, True):
        gradient = take(pair.gradient(slope), rows)
        found, wanted = (
            [torch.cat(parts) for parts in zip(*tiles.compact_gradient(columns, rows, gradient))]
            for tiles in pair.tiles
        )
        assert torch.equal(found[0], columns)
        torch.testing.assert_close(found[1], wanted[1], atol=2e-6, rtol=2e-5)


def test_compact_gradient_in_pieces():
    pair = Pair()
    pair.tiles[0].head = pair.head._replace(workspace_bytes=8 * 8 * 85 * 60)
    columns, rows = torch.arange(0, 500, 2), torch.arange(45)
    gradient = pair.gradient()
    pieces = list(pair.tiles[0].compact_gradient(columns, rows, gradient))
    assert len(pieces) > 1 and torch.equal(torch.cat([piece for piece, _ in pieces]), columns)
    whole, _ = pair.tiles[0].gradient(None, gradient)
    torch.testing.assert_close(torch.cat([dz for _, dz in pieces]), whole[columns])


def test_float64_is_refused():
    h, weight, target = problem(2, 10, 4, torch.float64)
    with pytest.raises(TypeError, match="'chunked' or 'reference'"):
        forward.statistics(h, weight, None, target, 1.0, None)


def test_a_cpu_is_refused_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(logits_tile, "INTERPRETED", False)
    h, weight, target = problem(2, 10, 4)
    with pytest.raises(RuntimeError, match="needs a CUDA device .*backend='chunked' runs there"):
        forward.statistics(h, weight, None, target, 1.0, None)


def test_the_table_knows_nothing_of_the_number_of_rows():
    half = torch.bfloat16
    assert tuning.config((9, 0), half, 3584) == tuning.SM90_WIDE
    assert tuning.config((9, 0), half, 3584, bias=True) == tuning.SM90_BIAS
    assert tuning.config((9, 0), half, 3584, bias=True, softcap=True) == tuning.SM90_SOFTCAP
    assert tuning.config((9, 0), half, 37) == tuning.UNALIGNED
    assert tuning.config((8, 6), half, 3584) == tuning.config((12, 0), half, 3584) == tuning.SM80
    assert tuning.config((9, 0), torch.float32, 3584) == tuning.FLOAT32
    assert tuning.tiles_per_part(152064, 256) == 9 and tuning.tiles_per_part(5, 256) == 1
