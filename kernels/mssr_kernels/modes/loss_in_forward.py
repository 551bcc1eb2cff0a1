"""Modes `exact` and `sparse`: the policy loss and its gradients in one pass over chunks of tokens.

The logits of a chunk give the statistics of its rows, the statistics give the derivative of the loss by each row's
log-probability (`row_loss`), and this gives the gradient by the logits, which overwrites them; two products finish the chunk.
6 NDV of matmul work, the least that an exact gradient can have; with a tolerance (`sparse`) 2 NDV and a few per cent of the
other 4. dW is accumulated in float32 over the chunks; `backward` only multiplies by the upstream scalar and rounds, once.

Only rows with a gradient enter a backward product. Selecting them waits for the device once per call and once per chunk.

Memory beside results and workspace: float32 dW, and float32 [N, D] for dhidden.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.base import Backend, Tiles
from ..config import PolicyLoss, PolicyLossConfig
from ..core.inputs import HeadInputs, RowInputs
from ..core.row_loss import RowTerms, assemble, row_loss
from ..core.statistics import RowGradient, RowStatistics, UpstreamGradient, row_gradient, take
from . import sparse

# The dense rows of a sparse chunk read and write all of dW. With fewer rows than this, it is faster to compute their logits
# again, later, together with those of other chunks. Break-even from measured rates (CPU) and data-sheet rates (CUDA).
DENSE_ROWS_WORTH_DW = {"cpu": 48, "cuda": 512}


class LossGradients(NamedTuple):
    """The gradients of the loss times `divisor`, in the compute dtype; None where not wanted."""

    hidden: Tensor | None  # [N, D]
    weight: Tensor | None  # [V, D]
    bias: Tensor | None  # [V]
    divisor: Tensor  # 0-d


def linear_policy_loss(
    head: HeadInputs, row_inputs: RowInputs, normalizer: Tensor | float | None, config: PolicyLossConfig, tolerance: float,
    wanted: tuple[bool, bool, bool], backend: Backend,
) -> tuple[PolicyLoss, LossGradients]:  # fmt: skip
    """Return the loss and its gradients by those of (hidden, weight, bias) that are wanted.

    tolerance 0 is mode `exact`, above 0 mode `sparse`.
    """
    rows = head.kept_rows()
    normalizer = _divisor(normalizer, len(rows), head)
    one = torch.ones_like(normalizer)
    if not any(wanted):
        statistics = backend.statistics(head, rows)
        terms, _ = row_loss(statistics.logp, statistics.entropy, row_inputs.take(rows, one.dtype), config)
        result = assemble(terms, rows, len(head.target), terms.loss.sum() / normalizer)
        return result, LossGradients(None, None, None, one)

    # In 16 bits the coefficients stay at about 1 (1 / normalizer underflows in fp16) and `backward` divides; otherwise they
    # are divided here, which costs nothing.
    divisor, scale = (normalizer, one) if backend.matmul(head).mixed else (one, 1 / normalizer)
    gradients = _Accumulator(head, wanted, tolerance)

    def add(chunk: Tensor, h: Tensor, statistics: RowStatistics, tiles: Tiles) -> RowTerms:
        inputs = row_inputs.take(chunk, one.dtype)
        terms, slope = row_loss(statistics.logp, statistics.entropy, inputs, config)
        bonus = torch.full_like(slope, -config.entropy_coef) * scale if config.entropy_coef else None
        gradients.add_chunk(tiles, chunk, h, statistics, UpstreamGradient(slope * scale, bonus))
        return terms

    # No name may hold the tiles of the last chunk when those of the deferred rows are allocated.
    terms = [add(*parts) for parts in backend.chunks(head, rows, sparse=tolerance > 0)]
    gradients.add_deferred(backend)
    terms = RowTerms(*map(torch.cat, zip(*terms))) if terms else _no_terms(one)
    result = assemble(terms, rows, len(head.target), terms.loss.sum() / normalizer)
    return result, LossGradients(*gradients.finish(), divisor)


class _Accumulator:
    """Accumulates the gradients of hidden, weight and bias over the chunks, in the compute dtype."""

    def __init__(self, head: HeadInputs, wanted: tuple[bool, bool, bool], tolerance: float):
        self.head, self.tolerance = head, tolerance
        options = dict(dtype=head.compute_dtype, device=head.hidden.device)
        self.hidden = torch.zeros(head.hidden.shape, **options) if wanted[0] else None
        self.weight = torch.empty(head.weight.shape, **options) if wanted[1] else None
        self.weight_is_empty = True
        self.bias = torch.zeros(head.bias.shape, **options) if wanted[2] else None
        self._deferred: list[tuple[Tensor, UpstreamGradient]] = []

    def add_chunk(self, tiles: Tiles, chunk: Tensor, h: Tensor, statistics: RowStatistics, upstream: UpstreamGradient):
        active = upstream.nonzero_rows()
        if not len(active):
            return
        target, head = self.head.local_target(chunk), self.head
        gradient = row_gradient(target, statistics, upstream, head.row_temperature(chunk), head.softcap)
        dense = active
        if self.tolerance:
            share = self.tolerance if head.shard is None else self.tolerance / head.shard.ranks
            tolerance = sparse.row_tolerance(share, statistics, upstream.entropy is not None, head.total_vocab)
            chosen = sparse.choose(tiles, active, target, statistics, tolerance)
            if chosen is not None:
                dense, few = chosen.dense_rows, chosen.sparse_rows
                self._add_sparse(tiles, chunk, h, chosen.columns, few, take(gradient, few))
                # Ranks choose on their own: rows that only some of them defer cannot be exchanged again.
                if head.shard is None and 0 < len(dense) < DENSE_ROWS_WORTH_DW.get(chunk.device.type, 0):
                    self._deferred.append((chunk[dense], take(upstream, dense)))
                    return
        if len(dense) == len(chunk):
            self._add_dense(tiles, chunk, h, None, gradient)
        elif len(dense):
            self._add_dense(tiles, chunk, h, dense, take(gradient, dense))

    def add_deferred(self, backend: Backend):
        """Add the gradients of the deferred rows, in chunks of their own."""
        if not self._deferred:
            return
        rows, upstream = zip(*self._deferred)
        upstream = UpstreamGradient(*(None if field[0] is None else torch.cat(field) for field in zip(*upstream)))
        self.tolerance, done = 0.0, 0
        for chunk, h, statistics, tiles in backend.chunks(self.head, torch.cat(rows), sparse=False):
            here = torch.arange(done, done + len(chunk), device=chunk.device)
            self.add_chunk(tiles, chunk, h, statistics, take(upstream, here))
            done += len(chunk)

    def _add_dense(self, tiles: Tiles, chunk: Tensor, h: Tensor, rows: Tensor | None, gradient: RowGradient):
        dz, rows = tiles.gradient(rows, gradient)
        if rows is not None:
            chunk, h = chunk[rows], h[rows]
        if self.bias is not None:
            self.bias += dz.sum(dim=1, dtype=self.bias.dtype)
        if self.hidden is not None:
            dh = torch.empty(h.shape, dtype=self.hidden.dtype, device=h.device)
            tiles.matmul.add_hidden_grad(dz, out=dh, beta=0)
            self.hidden.index_copy_(0, chunk, dh)
        if self.weight is not None:
            tiles.matmul.add_weight_grad(dz, h, out=self.weight, beta=0 if self.weight_is_empty else 1)
            self.weight_is_empty = False

    def _add_sparse(self, tiles: Tiles, chunk: Tensor, h: Tensor, columns: Tensor, rows: Tensor, gradient: RowGradient):
        h = h[rows]
        dh = None if self.hidden is None else torch.zeros(h.shape, dtype=self.hidden.dtype, device=h.device)
        self._start_weight()
        for piece, dz in tiles.compact_gradient(columns, rows, gradient):
            if self.bias is not None:
                self.bias.index_add_(0, piece, dz.sum(dim=1, dtype=self.bias.dtype))
            if dh is not None:
                tiles.matmul.add_hidden_grad(dz, out=dh, columns=piece)
            if self.weight is not None:
                dw = torch.empty(len(piece), h.shape[1], dtype=self.weight.dtype, device=h.device)
                tiles.matmul.add_weight_grad(dz, h, out=dw, beta=0)
                self.weight.index_add_(0, piece, dw)
        if dh is not None:
            self.hidden.index_copy_(0, chunk[rows], dh)

    def _start_weight(self):
        if self.weight is not None and self.weight_is_empty:
            self.weight.zero_()
            self.weight_is_empty = False

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        self._start_weight()
        if self.hidden is not None and self.head.shard is not None:
            self.head.shard.sum_(self.hidden)
        return self.hidden, self.weight, self.bias


def _divisor(normalizer: Tensor | float | None, kept_rows: int, head: HeadInputs) -> Tensor:
    """Return the divisor of the loss, 0-d; by default the number of rows, or 1 without any: loss 0, not 0 / 0."""
    options = dict(dtype=head.compute_dtype, device=head.hidden.device)
    if isinstance(normalizer, Tensor):
        return normalizer.detach().to(**options)
    return torch.full((), max(kept_rows, 1) if normalizer is None else normalizer, **options)


def _no_terms(like: Tensor) -> RowTerms:
    terms = RowTerms(*(like.new_empty(0) for _ in RowTerms._fields))
    return terms._replace(**{name: getattr(terms, name).bool() for name in ("clipped", "dual_clipped", "capped")})
