"""Compile the Triton kernels for real GPUs, on a machine without one, and report their use of the hardware.

`python codegen.py` compiles every kernel for every entry of the tuning table, with and without the options that change
its code, and prints one JSON object per kernel. It is a separate process, because Triton decides at import whether a kernel
is interpreted, and the other tests need interpreted kernels.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mssr_kernels.backends.triton import forward, slab
from mssr_kernels.backends.triton import tiles as passes
from mssr_kernels.backends.triton.logits_tile import EXACT
from mssr_kernels.backends.triton.tuning import TileConfig, config

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# Arguments by name. The rest are float32 tensors, or constants where a case names them.
OPERANDS = {"h", "weight", "bias", "weights", "out"}
INT64 = {"target", "column_of", "row_of", "ranks"}
OTHER = {"active": "*u8", "first": "*i32", "softcap": "fp32"}
ALIGNED = {"vocab", "width", "h_stride", "weight_stride", "store_stride", "out_stride", "stride"}
INTEGERS = {*ALIGNED, "rows", "parts", "tiles_of_part", "slots", "columns", "first_of_slab"}


class Case(NamedTuple):
    name: str
    kernel: triton.JITFunction
    capability: tuple[int, int]
    dtype: torch.dtype
    constants: dict  # constexpr arguments; None: the argument is absent
    tiles: TileConfig | None = None  # only for kernels with a matmul
    d: int = 3584


def matmul_cases():
    """Yield forward and slab kernels: plain, with bias, with every option; storing or not; D aligned for TMA or not."""
    half, single = torch.bfloat16, torch.float32
    for capability, dtype, d, options in (
        ((9, 0), half, 3584, "plain"),
        ((9, 0), half, 3584, "bias"),
        ((9, 0), half, 3584, "everything"),
        ((9, 0), half, 3585, "everything"),
        ((9, 0), single, 3584, "everything"),
        ((8, 0), torch.float16, 3584, "plain"),
        ((8, 0), half, 3584, "everything"),
        ((8, 0), half, 3585, "everything"),
        ((8, 0), single, 3584, "plain"),
        ((8, 0), single, 3584, "everything"),
    ):
        everything = options == "everything"
        tiles = config(capability, dtype, d, bias=options != "plain", softcap=everything)
        constants = dict(
            BLOCK_ROWS=tiles.block_rows,
            BLOCK_VOCAB=tiles.block_vocab,
            BLOCK_D=tiles.block_d,
            GROUP_ROWS=tiles.group_rows,
            TMA=tiles.tma,
            STORE_TMA=tiles.tma,
            ROW_TEMPERATURE=options != "plain",
        )
        if not everything:
            constants.update(softcap=None)
        if options == "plain":
            constants.update(bias=None)
        unstored = dict(weights=None, tile_maximum=None, tile_total=None, store_stride=0, STORE_TMA=False)
        gradient = {} if everything else dict(slope=None, cap_scale=None)
        head = f"sm_{capability[0]}0 {TYPE_NAMES[dtype]} D={d} {options}"
        for name, kernel, more in (
            ("forward", forward.forward_kernel, unstored),
            ("forward storing", forward.forward_kernel, {}),
            ("slab", slab.slab_kernel, gradient),
        ):
            yield Case(f"{name} {head}", kernel, capability, dtype, constants | more, tiles, d)
        if capability == (9, 0) and tiles.block_vocab == 256:  # the entropy's gradient needs the most registers here
            constants.update(ROW_TEMPERATURE=True, cap_scale=None)
            yield Case(f"slab with slope {head}", slab.slab_kernel, capability, dtype, constants, tiles, d)


def pass_cases():
    for capability, dtype in (((9, 0), torch.bfloat16), ((8, 0), torch.bfloat16), ((8, 0), torch.float32)):
        blocks = dict(
            TILE=config(capability, dtype, 3584).block_vocab,
            BLOCK_COLUMNS=passes.BLOCK_COLUMNS,
            BLOCK_ROWS=passes.BLOCK_ROWS,
        )
        everywhere = dict(column_of=None, row_of=None, slope=None, cap_scale=None)
        for name, kernel, more in (
            ("gradient", passes.gradient_kernel, everywhere),
            ("gradient of rows, everything", passes.gradient_kernel, dict(column_of=None)),
            ("compact gradient", passes.gradient_kernel, dict(slope=None, cap_scale=None)),
            ("first ranks", passes.first_ranks_kernel, {}),
            ("dropped mass", passes.dropped_mass_kernel, {}),
        ):
            head = f"sm_{capability[0]}0 {TYPE_NAMES[dtype]}"
            yield Case(f"{name} {head}", kernel, capability, dtype, blocks | more)
    for capability in ((9, 0), (8, 0)):
        for kernel, rows in (
            (forward.merge_kernel, forward.MERGED_ROWS),
            (passes.sum_parts_kernel, passes.BLOCK_ROWS),
        ):
            yield Case(
                f"{kernel.__name__} sm_{capability[0]}0", kernel, capability, torch.float32, dict(BLOCK_ROWS=rows)
            )


def argument_type(case: Case, name: str) -> str:
    if name in INTEGERS:
        return "i32"
    if name in INT64:
        return "*i64"
    if name in OTHER:
        return OTHER[name]
    if name == "temperature" and not case.constants["ROW_TEMPERATURE"]:
        return "fp32"
    if name not in OPERANDS:
        return "*fp32"
    element, tiles = TYPE_NAMES[case.dtype], case.tiles
    if tiles is not None and tiles.tma and name != "bias":
        block = {
            "h": (tiles.block_rows, tiles.block_d),
            "weight": (tiles.block_vocab, tiles.block_d),
        }.get(name, (tiles.block_vocab // 4, tiles.block_rows))
        return f"tensordesc<{element}[{block[0]},{block[1]}]>"
    return f"*{element}"


def compiled(case: Case):
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(case.kernel.arg_names):
        if name in case.constants:
            signature[name], constants[name] = "constexpr", case.constants[name]
            continue
        signature[name] = argument_type(case, name)
        multiple_of_d = name in ("width", "h_stride", "weight_stride")
        if signature[name].startswith("*") or (name in ALIGNED and not (multiple_of_d and case.d % 16)):
            attributes[(position,)] = [["tt.divisibility", 16]]
    options = dict(EXACT)
    if case.tiles is not None:
        options.update(num_warps=case.tiles.warps, num_stages=case.tiles.stages)
    target = GPUTarget("cuda", case.capability[0] * 10 + case.capability[1], 32)
    return triton.compile(ASTSource(case.kernel, signature, constants, attributes), target=target, options=options)


def usage(case: Case) -> dict:
    code = compiled(case)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(code.asm["cubin"])
        cubin.flush()
        command = [CUOBJDUMP, "-res-usage", cubin.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report)}
    ptx = code.asm["ptx"]
    return dict(
        name=case.name,
        arch=case.capability[0],
        half_product=case.tiles is not None and case.dtype.itemsize == 2,
        aligned=case.d % 16 == 0,
        registers=found["REG"],
        stack=found["STACK"],
        local=found["LOCAL"],
        shared=code.metadata.shared,
        wgmma=ptx.count("wgmma.mma_async"),
        mma_sync=ptx.count("mma.sync"),
        bulk_copies=ptx.count("cp.async.bulk.tensor"),
        wide_copies=len(re.findall(r"cp\.async\.cg.*0x10|cp\.async\.cg.*, 16", ptx)),
        sums=sums(code.asm["ttgir"]),
    )


def sums(ttgir: str) -> list[str]:
    """Return the type of each sum's operand, with its layout, which determines the order of the sum."""
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", ttgir, flags=re.M))
    reductions = re.findall(r'"tt.reduce"(.*?)\}\) : \((tensor<[^)]*)\) -> ', ttgir, flags=re.S)
    kinds = [kind for body, kind in reductions if "arith.addf" in body]
    return [re.sub(r"#\w+", lambda name: layouts.get(name[0], name[0]), kind) for kind in kinds]


if __name__ == "__main__":
    for case in (*matmul_cases(), *pass_cases()):
        if len(sys.argv) < 2 or sys.argv[1] in case.name:
            print(json.dumps(usage(case)), flush=True)
