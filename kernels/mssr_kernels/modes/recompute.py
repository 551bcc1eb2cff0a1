"""Mode `recompute`: the gradients of log-probs and entropies, for any upstream gradient.

The upstream gradient arrives only in the backward pass, so the logits are computed again, one slab of the vocabulary for all
rows at a time. The row statistics are known by then, and each slab of dW is complete when it is written. 8 NDV of matmul work
with the forward pass.

Only rows with a gradient enter a backward product. Selecting them waits for the device once.
"""

import torch
from torch import Tensor

from ..backends.base import Backend, fitting
from ..core.inputs import HeadInputs
from ..core.statistics import RowStatistics, UpstreamGradient, row_gradient, take

SLAB_MULTIPLE = 256  # columns: whole tiles of every backend, where there are so many


def gradients(
    head: HeadInputs, statistics: RowStatistics, upstream: UpstreamGradient, wanted: tuple[bool, bool, bool],
    backend: Backend,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients of hidden, weight and bias, None where not wanted. statistics, upstream: [N], of all rows."""
    hidden, weight, bias, *_ = head
    dtype, device = head.compute_dtype, hidden.device
    rows = head.kept_rows()
    rows = rows[take(upstream, rows).nonzero_rows()]
    statistics, upstream = take(statistics, rows), take(upstream, rows)
    d_hidden = torch.zeros(hidden.shape, dtype=hidden.dtype, device=device) if wanted[0] else None
    d_weight = torch.empty(weight.shape, dtype=weight.dtype, device=device) if wanted[1] else None
    d_bias = torch.empty(bias.shape, dtype=bias.dtype, device=device) if wanted[2] else None
    count = len(rows)
    if not count:
        return d_hidden, *(None if gradient is None else gradient.zero_() for gradient in (d_weight, d_bias))

    matmul = backend.matmul(head)
    # 16-bit operands: rescale the coefficients to about 1, so that fp16 does not underflow, and undo it at the end.
    size = None
    if matmul.mixed:
        size = torch.stack([field.abs().amax() for field in upstream if field is not None]).amax()
        upstream = UpstreamGradient(*(None if field is None else field / size for field in upstream))
    rounds_weight = weight.dtype != dtype
    column_bytes = backend.slab_bytes_per_column(head, matmul, count)
    if rounds_weight and wanted[1]:
        column_bytes += weight.shape[1] * dtype.itemsize  # a slab of dW before it is rounded
    width = fitting(head, column_bytes, matmul.buffer_bytes, "one column of logits")
    width = min(weight.shape[0], width - width % SLAB_MULTIPLE or width)

    temperature = head.row_temperature(rows)
    gradient = row_gradient(head.local_target(rows), statistics, upstream, temperature, head.softcap)
    padded_h = matmul.with_padding(hidden[rows].to(matmul.operand_dtype))
    h = padded_h[:count]
    dh = torch.zeros(count, hidden.shape[1], dtype=dtype, device=device) if wanted[0] else None
    slab_gradient = backend.slab_gradient(head, matmul, h, gradient, temperature, width)
    unrounded = None
    if wanted[1] and rounds_weight:
        unrounded = torch.empty(width, weight.shape[1], dtype=dtype, device=device)
    for start in range(0, weight.shape[0], width):
        columns = slice(start, min(start + width, weight.shape[0]))
        dz = slab_gradient(columns)
        if wanted[0]:
            matmul.add_hidden_grad(dz, out=dh, columns=columns)
        if wanted[1]:
            slab = d_weight[columns] if unrounded is None else unrounded[: len(dz)]
            matmul.add_weight_grad(dz, padded_h, out=slab, beta=0)
            if unrounded is not None:
                d_weight[columns] = slab if size is None else slab.mul_(size)
        if wanted[2]:
            column_sum = dz.sum(dim=1, dtype=dtype)
            d_bias[columns] = column_sum if size is None else column_sum * size
    if wanted[0]:
        if head.shard is not None:
            head.shard.sum_(dh)
        d_hidden.index_copy_(0, rows, (dh if size is None else dh.mul_(size)).to(hidden.dtype))
    return d_hidden, d_weight, d_bias
