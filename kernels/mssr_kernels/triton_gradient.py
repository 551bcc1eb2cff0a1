"""The gradient of one block of logits on chip. `statistics.RowGradient` has the formula and what its fields mean."""

import triton
import triton.language as tl

from .statistics import RowGradient
from .triton_matmul import LOG_FLOOR


@triton.jit
def logit_gradient(
    p,  # probabilities of a block, float32
    log_p,  # used with a slope only
    z,  # logits, used with a cap_scale only
    column,  # column numbers, [1, n] where rows are [m, 1], or the other way round
    row,
    inside,  # of the rows, like `row`
    target,  # pointers to RowGradient's fields
    label,
    constant,
    slope,
    cap_scale,
):
    """dL/dx of the block, float32. A masked column must come with p = 0; its logit may be anything but NaN or -inf."""
    dx = p * tl.load(constant + row, mask=inside, other=0)
    if slope is not None:
        dx += p * (tl.load(slope + row, mask=inside, other=0) * tl.maximum(log_p, LOG_FLOOR))
    if cap_scale is not None:
        of_cap = z * tl.load(cap_scale + row, mask=inside, other=0)
        dx *= 1 - of_cap * of_cap
    is_label = column == tl.load(target + row, mask=inside, other=-1)
    return tl.where(is_label, dx + tl.load(label + row, mask=inside, other=0), dx)


def gradient_arguments(gradient: RowGradient) -> dict:
    """RowGradient as arguments of a kernel."""
    names = dict(max="maximum")
    return {
        names.get(name, name): None if field is None else field.contiguous()
        for name, field in gradient._asdict().items()
    }
