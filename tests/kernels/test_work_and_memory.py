"""The chunked backend never holds all logits, and does no matmuls for rows without gradient or for frozen parameters."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mssr_kernels import PolicyLossConfig, linear_logprob_entropy, linear_policy_loss
from mssr_kernels.backends import matmul
from mssr_kernels.modes import ops

N, D, V = 240, 16, 4000
WORKSPACE = 1 << 20  # the logits are 3.8 MB


class Recorder(TorchDispatchMode):
    """Records matmul work, in units of one row's D x V product, and the peak of the memory allocated since it started."""

    def __init__(self):
        super().__init__()
        self.work, self.peak_bytes, self.largest = 0.0, 0, 0
        self._live, self._known = [], set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        for tensor in tree_leaves((arguments, keywords)):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._live_ids():
                self._known.add(tensor.untyped_storage()._cdata)  # existed before
        if function.namespace == "mssr_kernels":  # also record inside our operators
            with self:
                return getattr(ops, function.overloadpacket.__name__)(*arguments, **keywords)
        result = function(*arguments, **keywords)
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            a, b = [t for t in arguments if isinstance(t, torch.Tensor)][-2:]
            self.work += a.shape[0] * a.shape[1] * b.shape[1] / (D * V)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known and storage._cdata not in self._live_ids():
                    self._live.append((StorageWeakRef(storage), storage._cdata, storage.nbytes()))
                    self.largest = max(self.largest, storage.nbytes())
        self._live = [entry for entry in self._live if not entry[0].expired()]
        self.peak_bytes = max(self.peak_bytes, sum(size for *_, size in self._live))
        return result

    def _live_ids(self):
        return {identity for reference, identity, _ in self._live if not reference.expired()}


def leaves(hidden_grad=True, weight_grad=True):
    return (
        torch.randn(N, D, requires_grad=hidden_grad),
        (0.3 * torch.randn(V, D)).requires_grad_(weight_grad),
        torch.randint(V, (N,)),
    )


def policy_loss_work(hidden, weight, target, advantage=None, backward=True, **arguments):
    advantage = torch.randn(N) if advantage is None else advantage
    with Recorder() as recorder:
        loss = linear_policy_loss(hidden, weight, target, advantage, workspace_bytes=WORKSPACE, **arguments).loss
        if backward:
            loss.backward()
    return recorder


def test_memory_stays_within_the_workspace():
    recorder = policy_loss_work(*leaves())
    weight_grad, small = V * D * 4, 16 * N * D * 4
    assert recorder.peak_bytes <= WORKSPACE + weight_grad + small
    assert recorder.peak_bytes > WORKSPACE / 2  # and the workspace is used

    hidden, weight, target = leaves()
    with Recorder() as recorder:
        out = linear_logprob_entropy(hidden, weight, target, workspace_bytes=WORKSPACE)
        (out.logp + out.entropy).sum().backward()
    assert recorder.peak_bytes <= WORKSPACE + weight_grad + small


@pytest.mark.parametrize("function", ["policy_loss", "logprob_entropy"])
def test_memory_in_16_bit(function):
    hidden, weight, target = (t.detach() for t in leaves())
    hidden, weight = hidden.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()
    with Recorder() as recorder:
        if function == "policy_loss":
            linear_policy_loss(hidden, weight, target, torch.randn(N), workspace_bytes=WORKSPACE).loss.backward()
        else:
            linear_logprob_entropy(hidden, weight, target, workspace_bytes=WORKSPACE).logp.sum().backward()
    assert recorder.peak_bytes <= WORKSPACE + V * D * 6 + 16 * N * D * 4


def test_memory_of_sparse_chunks_and_the_rows_they_put_off():
    """Peaked rows, with every fourth row flat: the sparse mode postpones flat rows and computes their logits again."""
    hidden, weight, target = leaves()
    with torch.no_grad():
        weight.copy_(torch.randn(V, D))
        hidden.copy_(3 * weight[target])
        hidden[::4] = 0.01 * torch.randn(60, D)
    recorder = policy_loss_work(hidden, weight, target, torch.ones(N), vocab_drop_tol=2.0**-6)
    assert recorder.peak_bytes <= WORKSPACE + V * D * 4 + 16 * N * D * 4
    assert N + 60 * 3 <= recorder.work < 2.3 * N


def test_matmul_work_of_the_modes():
    assert policy_loss_work(*leaves()).work == pytest.approx(3 * N)
    hidden, weight, target = leaves()
    with Recorder() as recorder:
        linear_logprob_entropy(hidden, weight, target, workspace_bytes=WORKSPACE).logp.sum().backward()
    assert recorder.work == pytest.approx(4 * N)
    with torch.no_grad():
        assert policy_loss_work(*leaves(), backward=False).work == pytest.approx(N)


def test_frozen_head_costs_no_weight_gradient():
    recorder = policy_loss_work(*leaves(weight_grad=False))
    assert recorder.work == pytest.approx(2 * N)
    assert recorder.peak_bytes <= WORKSPACE + 16 * N * D * 4
    assert policy_loss_work(*leaves(hidden_grad=False)).work == pytest.approx(2 * N)
    assert policy_loss_work(*leaves(False, False), backward=False).work == pytest.approx(N)


def test_rows_without_gradient_enter_no_backward_matmul():
    advantage = torch.randn(N)
    advantage[40:100] = 0
    assert policy_loss_work(*leaves(), advantage).work == pytest.approx(N + 2 * (N - 60))
    # clipped rows: that their gradient is zero is known only after the ratio
    hidden, weight, target = leaves()
    old_logp = linear_logprob_entropy(hidden, weight, target).logp.detach()
    old_logp[:50] -= 1
    work = policy_loss_work(hidden, weight, target, torch.ones(N), old_logp=old_logp).work
    assert work == pytest.approx(N + 2 * (N - 50))
    # with an entropy bonus every row has a gradient
    bonus = PolicyLossConfig(entropy_coef=0.1)
    assert policy_loss_work(*leaves(), torch.zeros(N), config=bonus).work == pytest.approx(3 * N)
    assert policy_loss_work(*leaves(), torch.zeros(N)).work == pytest.approx(N)


def test_ignored_rows_enter_no_matmul():
    hidden, weight, target = leaves()
    target[:90] = -100
    assert policy_loss_work(hidden, weight, target).work == pytest.approx(3 * (N - 90))
    hidden, weight, target = leaves()
    upstream = torch.zeros(N)
    upstream[:7] = 1
    with Recorder() as recorder:
        (linear_logprob_entropy(hidden, weight, target, workspace_bytes=WORKSPACE).logp * upstream).sum().backward()
    assert recorder.work == pytest.approx(N + 3 * 7)


def test_gradient_buffer_becomes_grad_without_a_copy():
    hidden, weight, target = leaves()
    loss = linear_policy_loss(hidden, weight, target, torch.randn(N)).loss
    with Recorder() as recorder:
        loss.backward()
    assert recorder.largest < V * D * 4


def whole(matrix, dim):
    return matrix.narrow(dim, 0, matrix.shape[dim] // 8 * 8)


class _MixedOperands:
    """torch, with GEMMs of 16-bit operands and float32 results, which only CUDA has. A GEMM of cuBLAS 13.0 was seen to lose
    the last term of a sum of 10,241 terms; these drop all terms beyond the last multiple of 8."""

    def __getattr__(self, name):
        return getattr(torch, name)

    @staticmethod
    def mm(a, b, out_dtype=None, out=None):
        assert a.dtype == b.dtype == torch.float16 and out_dtype == out.dtype == torch.float32
        return out.copy_(whole(a, 1).float() @ whole(b, 0).float())

    @staticmethod
    def addmm(c, a, b, beta=1, out_dtype=None, out=None):
        assert a.dtype == b.dtype == torch.float16 and out_dtype == out.dtype == c.dtype == torch.float32
        return out.copy_(whole(a, 1).float() @ whole(b, 0).float() + (beta * c if beta else 0))


@pytest.fixture
def mixed_operands(monkeypatch):
    """Make the CPU take CUDA's path for 16-bit operands."""
    initialise = matmul.HeadMatmul.__init__

    def mixed(self, weight, compute_dtype, slab_bytes):
        initialise(self, weight, compute_dtype, slab_bytes)
        self.mixed, self.upcasts, self.operand_dtype = True, False, weight.dtype
        self.slab, self.buffer_bytes = weight.shape[0], 0

    monkeypatch.setattr(matmul, "torch", _MixedOperands())
    monkeypatch.setattr(matmul.HeadMatmul, "__init__", mixed)


@pytest.mark.parametrize("backend", ["chunked", "triton"])
@pytest.mark.parametrize("function", ["policy_loss", "logp and entropy", "entropy alone", "entropy and zero logp"])
def test_small_gradients_survive_16_bit_operands(function, backend, mixed_operands):
    """A row's coefficient is about 1 / normalizer, here 1e-9, which is zero in fp16 unless it is rescaled around the matmul.

    Rows, columns and width are not multiples of 8, and the last row's label is the last column.
    """
    tiny, loss_scale = 1e-9, 2.0**20
    rows, columns, width = N - 3, V - 5, D - 3
    hidden, weight, target = (t.detach() for t in leaves())
    hidden, weight, target = hidden[:rows, :width], weight[:columns, :width], target[:rows].clamp(max=columns - 1)
    target[-1] = columns - 1
    operands = [t.half().contiguous().requires_grad_() for t in (hidden, weight, torch.randn(columns))]
    advantage = torch.randn(rows)
    advantage[:20] = 0
    grads = {}
    for name in ("reference", backend):
        for t in operands:
            t.grad = None
        settings = dict(bias=operands[2], backend=name, workspace_bytes=WORKSPACE)
        if function == "policy_loss":
            loss = linear_policy_loss(*operands[:2], target, advantage, normalizer=1 / tiny, **settings).loss
        else:
            out = linear_logprob_entropy(*operands[:2], target, **settings)
            loss = out.entropy * advantage.sin()
            if function != "entropy alone":
                loss = loss + out.logp * advantage * (0 if "zero" in function else 1)
            loss = (loss * tiny).sum()
        (loss * loss_scale).backward()
        grads[name] = [t.grad.float() for t in operands]
    for got, want in zip(grads[backend], grads["reference"]):
        assert want.abs().max() > 1e-6
        assert (got - want).norm() <= 5e-3 * want.norm()
