"""The chunked backend: plain PyTorch, CPU and CUDA, at most `workspace_bytes` of logits at a time.

Mode L (`linear_policy_loss`): token chunks. A chunk's logits give the statistics of its rows, these the derivative of the
loss by each row's log-probability (`row_loss`), and this the gradient by the logits, written over them; two GEMMs later
the chunk is done. 6 NDV of matmul work, the least an exact gradient can have. dW is accumulated in float32 over the
chunks; `backward` only multiplies by the upstream scalar and rounds, once.

Mode G (`linear_logprob_entropy`): the upstream gradient of each row arrives in `backward`, so the logits are computed
again, one slab of the vocabulary for all rows at a time: the row statistics are known by then, and each slab of dW is
complete as soon as it is written. 8 NDV.

Only rows with a gradient enter a backward GEMM and ignored rows enter none. Selecting them costs one wait for the
device per call and, in mode L, one per chunk.

Memory beside the results and the workspace: float32 dW (mode L) and float32 [N, D] for dhidden.
"""

import torch
from torch import Tensor

from .checks import HeadInputs, RowInputs
from .matmul import HeadMatmul
from .row_loss import RowTerms, assemble, row_loss
from .row_softmax import (
    SCRATCH_BLOCKS,
    RowStatistics,
    Scratch,
    UpstreamGradient,
    finish_logits_,
    logits_to_gradient_,
    row_statistics,
)
from .types import LogprobEntropy, PolicyLoss, PolicyLossConfig


def linear_logprob_entropy(head: HeadInputs) -> LogprobEntropy:
    """Mode G. Gradient flows through all three outputs."""
    return LogprobEntropy(*_LogprobEntropy.apply(head.hidden, head.weight, head.bias, head))


def linear_policy_loss(
    head: HeadInputs, row_inputs: RowInputs, normalizer: Tensor | float | None, config: PolicyLossConfig
) -> PolicyLoss:
    """Mode L: the loss and, where anything requires it, its gradients, in one pass over the token chunks."""
    wanted = [torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in head[:3]]
    with torch.no_grad():
        rows = _kept_rows(head)
        normalizer = _divisor(normalizer, len(rows), head)
        gradients = _Gradients(head, *wanted) if any(wanted) else None
        chunks = _TokenChunks(head, rows)
        # In 16 bits the coefficients keep their natural size of about 1 (1 / normalizer underflows in fp16) and
        # `backward` divides; otherwise they are divided here, which is free.
        scale = None if chunks.matmul.mixed else 1 / normalizer
        if gradients is not None:
            gradients.divisor = normalizer if chunks.matmul.mixed else None

        terms = []
        for chunk, z, h, statistics in chunks:
            chunk_terms, slope = row_loss(statistics.logp, statistics.entropy, row_inputs.take(chunk, z.dtype), config)
            terms.append(chunk_terms)
            if gradients is not None:
                bonus = torch.full_like(slope, -config.entropy_coef) if config.entropy_coef else None
                upstream = UpstreamGradient(*(c if c is None or scale is None else c * scale for c in (slope, bonus)))
                gradients.add_chunk(chunks, chunk, z, h, statistics, upstream)
        terms = RowTerms(*map(torch.cat, zip(*terms))) if terms else _no_terms(head)
        result = assemble(terms, rows, head.hidden.shape[0], terms.loss.sum() / normalizer)
    if gradients is None:
        return result
    return result._replace(loss=_LossWithGradients.apply(head.hidden, head.weight, head.bias, result.loss, gradients))


class _TokenChunks:
    """Iterates over the kept rows in chunks whose logits, with all that goes with them, fit into the workspace.

    Yields (row numbers [C], logits [C, V], hidden rows [C, D] ready for a matmul, statistics). The logits are
    overwritten by the next chunk.
    """

    def __init__(self, head: HeadInputs, rows: Tensor):
        self.head, self.rows = head, rows
        vocab, dtype = head.weight.shape[0], head.compute_dtype
        self.matmul = HeadMatmul(head.weight, dtype, slab_bytes=head.workspace_bytes // 8)
        self.scratch = Scratch(vocab, dtype, head.hidden.device, max_bytes=head.workspace_bytes // 4)
        self.bias = None if head.bias is None else head.bias.detach().to(dtype)
        row_bytes = vocab * (dtype.itemsize + (self.matmul.operand_dtype.itemsize if self.matmul.mixed else 0))
        fixed_bytes = self.scratch.bytes + self.matmul.buffer_bytes
        most = _fitting(head, row_bytes, fixed_bytes, "one row of logits")
        chunk_count = -(-len(rows) // most)
        self.size = -(-len(rows) // max(chunk_count, 1))  # equal chunks, no small one at the end

    def __iter__(self):
        head = self.head
        if not len(self.rows):
            return
        buffer = torch.empty(self.size, head.weight.shape[0], dtype=head.compute_dtype, device=head.hidden.device)
        for chunk in self.rows.split(self.size):
            z = buffer[: len(chunk)]
            h = head.hidden.detach()[chunk].to(self.matmul.operand_dtype)
            self.matmul.logits(h, out=z)
            temperature = _row_temperature(head, chunk)
            statistics = row_statistics(z, head.target[chunk], self.bias, temperature, head.softcap, self.scratch)
            yield chunk, z, h, statistics


class _Gradients:
    """Gradients of the loss, formed in the forward pass: float32 accumulators, handed out once by `release`."""

    def __init__(self, head: HeadInputs, hidden: bool, weight: bool, bias: bool):
        self.dtype = head.hidden.dtype
        options = dict(dtype=head.compute_dtype, device=head.hidden.device)
        self.hidden = torch.zeros(head.hidden.shape, **options) if hidden else None
        self.weight = torch.empty(head.weight.shape, **options) if weight else None
        self.weight_is_empty = True
        self.bias = torch.zeros(head.bias.shape, **options) if bias else None
        self.divisor = None  # 0-d, where the coefficients were not divided by the normalizer

    def add_chunk(self, chunks: _TokenChunks, chunk, z, h, statistics: RowStatistics, upstream: UpstreamGradient):
        head, active = chunks.head, upstream.nonzero_rows()
        if len(active) < len(chunk):
            z = _compact_(z, active, chunks.scratch)
            chunk, h = chunk[active], h[active]
            statistics, upstream = statistics.take(active), upstream.take(active)
        if not len(active):
            return
        logits_to_gradient_(
            z,
            head.target[chunk],
            statistics,
            upstream,
            _row_temperature(head, chunk),
            head.softcap,
            chunks.scratch,
            masked=head.bias is not None,
        )
        if self.bias is not None:
            self.bias += z.sum(dim=0)
        dz = z.to(chunks.matmul.operand_dtype)
        if self.hidden is not None:
            dh = torch.empty_like(h, dtype=z.dtype)
            chunks.matmul.add_hidden_grad(dz, out=dh, beta=0)
            self.hidden.index_copy_(0, chunk, dh)
        if self.weight is not None:
            chunks.matmul.add_weight_grad(dz, h, out=self.weight, beta=0 if self.weight_is_empty else 1)
            self.weight_is_empty = False

    def release(self, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients times the upstream scalar, in the dtype of the inputs. Multiplies in place: call once."""
        if self.weight is not None and self.weight_is_empty:
            self.weight.zero_()
        factor = upstream if self.divisor is None else upstream / self.divisor
        # Looking at the value is free on the CPU only; elsewhere it would wait for the device.
        is_one = factor.device.type == "cpu" and factor.item() == 1
        return tuple(
            None if gradient is None else (gradient if is_one else gradient.mul_(factor)).to(self.dtype)
            for gradient in (self.hidden, self.weight, self.bias)
        )


class _LossWithGradients(torch.autograd.Function):
    """A loss whose gradients are known already."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, loss, gradients: _Gradients):
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream):
        _refuse_double_backward("linear_policy_loss")
        # Kept nowhere else, so that autograd can make the very buffers `.grad` instead of copying them.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "linear_policy_loss: its gradients, formed in the forward pass, were handed out by an earlier backward; "
                "call the function again instead of using retain_graph"
            )
        return *gradients.release(upstream), None, None


class _LogprobEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, head: HeadInputs):
        rows = _kept_rows(head)
        found = [statistics for *_, statistics in _TokenChunks(head, rows)]
        total, dtype = hidden.shape[0], head.compute_dtype
        found = RowStatistics(*map(torch.cat, zip(*found))) if found else RowStatistics(*_empty(head, 4))
        ctx.save_for_backward(hidden, weight, bias, rows, *found)
        ctx.head = head._replace(hidden=None, weight=None, bias=None)
        ctx.set_materialize_grads(False)
        return tuple(
            torch.zeros(total, dtype=dtype, device=hidden.device).index_copy_(0, rows, value)
            for value in (found.logp, found.entropy, found.lse)
        )

    @staticmethod
    def backward(ctx, *upstream):
        _refuse_double_backward("linear_logprob_entropy")
        hidden, weight, bias, rows, *statistics = ctx.saved_tensors
        head = ctx.head._replace(hidden=hidden, weight=weight, bias=bias)
        if all(gradient is None for gradient in upstream):
            return None, None, None, None
        upstream = UpstreamGradient(*upstream).take(rows)
        active = upstream.nonzero_rows()
        with torch.autocast(hidden.device.type, enabled=False):
            return *_recompute_gradients(
                head, rows[active], RowStatistics(*statistics).take(active), upstream.take(active), ctx.needs_input_grad
            ), None


def _recompute_gradients(
    head: HeadInputs, rows: Tensor, statistics: RowStatistics, upstream: UpstreamGradient, wanted
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Mode G's backward: gradients by hidden, weight and bias, one slab of the vocabulary at a time."""
    hidden, weight, bias = head[:3]
    dtype, device, count = head.compute_dtype, hidden.device, len(rows)
    d_hidden = torch.zeros(hidden.shape, dtype=hidden.dtype, device=device) if wanted[0] else None
    d_weight = torch.empty(weight.shape, dtype=weight.dtype, device=device) if wanted[1] else None
    d_bias = torch.empty(bias.shape, dtype=bias.dtype, device=device) if wanted[2] else None
    if not count:
        return d_hidden, *(None if gradient is None else gradient.zero_() for gradient in (d_weight, d_bias))

    matmul = HeadMatmul(weight, dtype, slab_bytes=head.workspace_bytes // 8)
    column_bytes = count * (dtype.itemsize + (matmul.operand_dtype.itemsize if matmul.mixed else 0))
    column_bytes += SCRATCH_BLOCKS * dtype.itemsize  # at the least
    rounds_weight = weight.dtype != dtype
    if rounds_weight and wanted[1]:
        column_bytes += weight.shape[1] * dtype.itemsize  # a slab of dW before it is rounded
    scratch_bytes = head.workspace_bytes // 4
    width = _fitting(head, column_bytes, scratch_bytes + matmul.buffer_bytes, "one column of logits")
    width = min(width, weight.shape[0])
    scratch = Scratch(width, dtype, device, max_bytes=scratch_bytes)

    # 16-bit operands: bring the coefficients to a size of about 1, so that fp16 does not underflow, and undo it after.
    size = None
    if matmul.mixed:
        size = torch.stack([field.abs().amax() for field in upstream if field is not None]).amax()
        upstream = UpstreamGradient(*(None if field is None else field / size for field in upstream))
    target, temperature = head.target[rows], _row_temperature(head, rows)
    h = hidden[rows].to(matmul.operand_dtype)
    dh = torch.zeros(count, hidden.shape[1], dtype=dtype, device=device) if wanted[0] else None
    buffer = torch.empty(count * width, dtype=dtype, device=device)
    for start in range(0, weight.shape[0], width):
        columns = slice(start, min(start + width, weight.shape[0]))
        z = buffer[: count * (columns.stop - start)].view(count, -1)
        matmul.logits(h, out=z, columns=columns)
        finish_logits_(z, None if bias is None else bias[columns].to(dtype), temperature, head.softcap)
        logits_to_gradient_(
            z,
            target,
            statistics,
            upstream,
            temperature,
            head.softcap,
            scratch,
            masked=bias is not None,
            first_column=start,
        )
        dz = z.to(matmul.operand_dtype)
        if wanted[0]:
            matmul.add_hidden_grad(dz, out=dh, columns=columns)
        if wanted[1]:
            slab = torch.empty_like(d_weight[columns], dtype=dtype) if rounds_weight else d_weight[columns]
            matmul.add_weight_grad(dz, h, out=slab, beta=0)
            if rounds_weight:
                d_weight[columns] = slab if size is None else slab.mul_(size)
        if wanted[2]:
            d_bias[columns] = z.sum(dim=0) if size is None else z.sum(dim=0) * size
    if wanted[0]:
        d_hidden.index_copy_(0, rows, (dh if size is None else dh.mul_(size)).to(hidden.dtype))
    return d_hidden, d_weight, d_bias


def _refuse_double_backward(name: str):
    # Autograd's once_differentiable only objects where the upstream gradient requires grad, which that of a loss does not.
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name} has no double backward: drop create_graph=True, or use backend='reference'")


def _kept_rows(head: HeadInputs) -> Tensor:
    return (head.target != head.ignore_index).nonzero()[:, 0]


def _divisor(normalizer: Tensor | float | None, kept_rows: int, head: HeadInputs) -> Tensor:
    """The divisor of the loss as a 0-d tensor; by default the number of rows, or 1 without any: loss 0, not 0 / 0."""
    options = dict(dtype=head.compute_dtype, device=head.hidden.device)
    if isinstance(normalizer, Tensor):
        return normalizer.detach().to(**options)
    return torch.full((), max(kept_rows, 1) if normalizer is None else normalizer, **options)


def _row_temperature(head: HeadInputs, rows: Tensor) -> Tensor | float:
    if isinstance(head.temperature, Tensor):
        return head.temperature[rows, None].to(head.compute_dtype)
    return head.temperature


def _fitting(head: HeadInputs, unit_bytes: int, fixed_bytes: int, unit: str) -> int:
    """How many units of `unit_bytes` the workspace holds beside `fixed_bytes`."""
    count = (head.workspace_bytes - fixed_bytes) // max(unit_bytes, 1)
    if count < 1:
        raise ValueError(
            f"workspace_bytes = {head.workspace_bytes} does not hold {unit} ({unit_bytes} bytes, and {fixed_bytes} of "
            f"scratch): pass at least {2 * (unit_bytes + fixed_bytes)}"
        )
    return count


def _compact_(z: Tensor, rows: Tensor, scratch: Scratch) -> Tensor:
    """Move the given rows (ascending) of z to its beginning, in place: a row never moves past one still to be read."""
    for here, block, spare, _ in scratch.blocks(z[: len(rows)]):
        block.copy_(torch.index_select(z, 0, rows[here], out=spare))
    return z[: len(rows)]


def _empty(head: HeadInputs, count: int) -> list[Tensor]:
    return [torch.empty(0, dtype=head.compute_dtype, device=head.hidden.device) for _ in range(count)]


def _no_terms(head: HeadInputs) -> RowTerms:
    terms = RowTerms(*_empty(head, len(RowTerms._fields)))
    return terms._replace(clipped=terms.clipped.bool(), dual_clipped=terms.dual_clipped.bool())
