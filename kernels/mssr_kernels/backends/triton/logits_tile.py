"""What the Triton kernels share: a tile of logits from two operands in memory, its gradient, the order of tiles, launching.

A program multiplies [BLOCK_ROWS, D] by [BLOCK_VOCAB, D]^T, BLOCK_D at a time, into float32 accumulators, and finishes
the logits in registers: bias, softcap, temperature, -inf beyond the vocabulary. Operands are loaded by TMA descriptors
(sm_90) or by pointers (asynchronous copies on sm_80), with the same results bit for bit.

Kernels are compiled without contraction of products and sums (`enable_fp_fusion=False`) and without specialisation on
the number of rows, so that bits depend neither on the number of rows nor on whether weights are stored.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...core.statistics import PerRow, RowGradient
from .tuning import TileConfig, config

# @triton.jit reads the same knob when this package's kernels are imported.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
# Options of every launch. Batch invariance must not depend on which products the compiler contracts.
EXACT = dict(enable_fp_fusion=False)
# A maximum starts at the lowest finite number: above -inf, and the difference of two finite numbers is never NaN.
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
NEGATIVE_INFINITY = tl.constexpr(float("-inf"))
# A floor under log p: p is 0 long before, and 0 * -inf would be NaN.
LOG_FLOOR = tl.constexpr(-1000.0)


@triton.jit
def grouped_tile(program, row_tiles, parts, GROUP_ROWS: tl.constexpr):
    """Return (row tile, part of the vocabulary) of a program. GROUP_ROWS row tiles go through the parts side by side, so
    that programs that run together read few distinct tiles of either operand, which stay in L2."""
    group = program // (GROUP_ROWS * parts)
    first = group * GROUP_ROWS
    members = tl.minimum(row_tiles - first, GROUP_ROWS)
    within = program % (GROUP_ROWS * parts)
    return first + within % members, within // members


@triton.jit
def tanh(x):
    """Return tanh(x): near 0, where the quotient loses digits by cancellation, from the series."""
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    decayed = tl.exp(-2 * tl.abs(x))
    quotient = (1 - decayed) / (1 + decayed)
    return tl.where(square < 0.0625, series, tl.where(x < 0, -quotient, quotient))


@triton.jit
def product_tile(
    h,  # [rows, width], descriptor or pointer
    weight,  # [vocab, width], descriptor or pointer
    first_row, first_column, rows, vocab, width, h_stride, weight_stride,
    BLOCK_ROWS: tl.constexpr, BLOCK_VOCAB: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Return h W^T of a tile, [BLOCK_ROWS, BLOCK_VOCAB] float32. Values beyond the edges of the matrices are undefined."""
    if not TMA:
        # Beyond the edges the last row and column are read, so that only the end of D needs masks in the loop.
        row = tl.minimum(first_row + tl.arange(0, BLOCK_ROWS), rows - 1).to(tl.int64)
        column = tl.minimum(first_column + tl.arange(0, BLOCK_VOCAB), vocab - 1).to(tl.int64)
        offset = tl.arange(0, BLOCK_D)
        h_tile = h + row[:, None] * h_stride + offset[None, :]
        weight_tile = weight + column[:, None] * weight_stride + offset[None, :]

    product = tl.zeros([BLOCK_ROWS, BLOCK_VOCAB], tl.float32)
    for first_d in range(0, width, BLOCK_D):
        if TMA:
            a = h.load([first_row, first_d])
            b = weight.load([first_column, first_d])
        else:
            inside = (offset < width - first_d)[None, :]
            a = tl.load(h_tile + first_d, mask=inside, other=0)
            b = tl.load(weight_tile + first_d, mask=inside, other=0)
        if INTERPRETED:  # the interpreter's product of two bf16 tiles is wrong
            a, b = a.to(tl.float32), b.to(tl.float32)
        product = tl.dot(a, b.T, product, input_precision="ieee")
    return product


@triton.jit
def halves(x):
    """Return the left and the right half of x: [m, n] -> two of [m, n / 2]."""
    return x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def quarters(x):
    """Return the quarters of x: [m, n] -> four of [m, n / 4]. What follows a product is done per quarter: the accumulators
    take half of the registers, and the intermediate values of all of them would not fit into the other half."""
    left, right = halves(x)
    first, second = halves(left)
    third, fourth = halves(right)
    return first, second, third, fourth


@triton.jit
def finish_logits(x, column, vocab, bias, softcap, scale):
    """Return z [m, n] float32 from x = h W^T, -inf beyond the vocabulary. column [n]; scale [m]: 1 / temperature."""
    inside = column < vocab
    if bias is not None:
        x += tl.load(bias + column, mask=inside, other=0).to(tl.float32)[None, :]
    if softcap is not None:
        x = softcap * tanh(x * (1 / softcap))
    return tl.where(inside[None, :], x * scale[:, None], NEGATIVE_INFINITY)


@triton.jit
def logit_gradient(
    p,  # probabilities of a block, float32
    log_p,  # used with a slope only
    z,  # logits, used with a cap_scale only
    column, row,  # column numbers [1, n] and row numbers [m, 1], or [n, 1] and [1, m]
    inside,  # of the rows, like `row`
    target, label, constant, slope, cap_scale,  # pointers to RowGradient's fields
):  # fmt: skip
    """Return dL/dx of the block, float32. A masked column must have p = 0 and a logit other than NaN or -inf."""
    dx = p * tl.load(constant + row, mask=inside, other=0)
    if slope is not None:
        dx += p * (tl.load(slope + row, mask=inside, other=0) * tl.maximum(log_p, LOG_FLOOR))
    if cap_scale is not None:
        of_cap = z * tl.load(cap_scale + row, mask=inside, other=0)
        dx *= 1 - of_cap * of_cap
    is_label = column == tl.load(target + row, mask=inside, other=-1)
    return tl.where(is_label, dx + tl.load(label + row, mask=inside, other=0), dx)


@triton.jit
def store_transposed(matrix, x, first_column, first_row, columns, stride, TMA: tl.constexpr):
    """Store x^T to matrix[first_column :, first_row :]. matrix [columns, rows]: a descriptor or a pointer.

    By pointer, the padding of the matrix's rows is written too: with a mask on a multiple of 16, whole vectors are stored.
    """
    if TMA:
        matrix.store([first_column, first_row], x.T.to(matrix.dtype))
    else:
        column = first_column + tl.arange(0, x.shape[1])
        row = first_row + tl.arange(0, x.shape[0])
        place = matrix + column.to(tl.int64)[None, :] * stride + row[:, None]
        tl.store(place, x.to(matrix.dtype.element_ty), mask=(column < columns)[None, :] & (row < stride)[:, None])


@triton.jit
def row_scale(temperature, row, rows, PER_ROW: tl.constexpr):
    """Return 1 / temperature, [BLOCK_ROWS] float32; rounded the same for a number and a tensor full of it."""
    one = tl.full(row.shape, 1, tl.float32)
    if PER_ROW:
        return tl.div_rn(one, tl.load(temperature + row, mask=row < rows, other=1))
    else:
        return tl.div_rn(one, one * temperature)


def tile_config(weight: Tensor, bias: Tensor | None, softcap: float | None) -> TileConfig:
    """Return the table's entry for this head on its device. Raises for what the kernels cannot do."""
    device = weight.device
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError("'triton' takes float32, bfloat16 or float16: use 'chunked' or 'reference' for float64")
    if weight.stride(1) != 1:
        raise ValueError("the triton backend needs the rows of weight [V, D] contiguous: pass weight.contiguous()")
    if INTERPRETED:
        capability = None
    elif device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
    elif device.type == "meta":  # a plan (`explain`) is for Hopper
        capability = (9, 0)
    else:
        raise RuntimeError(
            "the triton backend needs a CUDA device (or TRITON_INTERPRET=1 for tests): "
            f"weight is on {device}; backend='chunked' runs there"
        )
    return config(capability, weight.dtype, weight.shape[1], bias is not None, softcap is not None)


def operands(h: Tensor, weight: Tensor, tiles: TileConfig) -> dict:
    """Return the arguments of a kernel that calls `product_tile`, and its launch options. h [rows, D], weight [V, D]."""
    # A weight need not be aligned: FSDP's are views into flat storage.
    tma = tiles.tma and h.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0
    arguments = dict(
        h=h, weight=weight, rows=h.shape[0], vocab=weight.shape[0], width=h.shape[1],
        h_stride=h.stride(0), weight_stride=weight.stride(0), BLOCK_ROWS=tiles.block_rows, BLOCK_VOCAB=tiles.block_vocab,
        BLOCK_D=tiles.block_d, GROUP_ROWS=tiles.group_rows, TMA=tma, num_warps=tiles.warps, num_stages=tiles.stages, **EXACT,
    )  # fmt: skip
    if tma:
        arguments["h"] = TensorDescriptor.from_tensor(h, [tiles.block_rows, tiles.block_d])
        arguments["weight"] = TensorDescriptor.from_tensor(weight, [tiles.block_vocab, tiles.block_d])
    return arguments


def transposed_target(matrix: Tensor, tiles: TileConfig) -> Tensor | TensorDescriptor:
    """Return `matrix` [columns, rows] for `store_transposed`: by TMA if its lines begin at multiples of 16 bytes."""
    if not tiles.tma or matrix.stride(0) * matrix.itemsize % 16 or matrix.data_ptr() % 16:
        return matrix
    return TensorDescriptor.from_tensor(matrix, [tiles.block_vocab // 4, tiles.block_rows])


def row_temperature(temperature: PerRow) -> dict:
    """Return the arguments for `row_scale`."""
    if isinstance(temperature, Tensor):
        return dict(temperature=temperature.float().contiguous(), ROW_TEMPERATURE=True)
    return dict(temperature=float(temperature), ROW_TEMPERATURE=False)


def gradient_arguments(gradient: RowGradient) -> dict:
    """Return RowGradient as arguments of a kernel."""
    names = dict(max="maximum")
    return {
        names.get(name, name): None if field is None else field.contiguous()
        for name, field in gradient._asdict().items()
    }


def on(device: torch.device):
    """Return a context in which Triton launches on `device`: by itself it uses the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
