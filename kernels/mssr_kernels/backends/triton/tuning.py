"""Tile shapes of the Triton kernels: a checked-in table by architecture and dtype.

They never depend on the number of tokens: the bits of a row's log-prob must not depend on its batch, so the order of its sums
must not. For the same reason the vocabulary is cut into parts whose number depends on V alone.

    sm_90       128 x 256 x 64, the tile that keeps wgmma busy: 8 warps hold its float32 accumulators in 128 registers per
                thread, TMA fills 3 stages of 48 KB, one program runs per SM. With a bias 4 stages: 3 spill where weights
                are stored. On an H200 at the 7B head, N 8192, in ms for all rows (triton 3.6.0):
                                        plain   bias    storing     storing, bias
                    3 stages            12.1    13.5    14.6        15.4
                    4 stages            13.4    14.1    14.1        15.1
                    128 x 128 x 64      14.6    15.4    16.9        17.9
                128 x 128 x 64 with a softcap: the wide tile leaves no registers for it
    sm_80       128 x 128 x 64 by asynchronous copies: 96 KB, which its smaller siblings have too
    unaligned   64 x 128 x 32: with D not a multiple of 16 neither TMA nor wide copies work, and a pointer per element
                costs registers
    float32     64 x 64 x 16 by FMA without tensor cores, exact (no tf32)

After changing an entry, run tests/kernels/test_codegen.py: it compiles every entry and fails on spills.
"""

from typing import NamedTuple

import torch

# A multiple of half the 132 SMs of an H100: 64 row tiles of 66 parts are 32 full waves.
VOCABULARY_PARTS = 66


class TileConfig(NamedTuple):
    """A logits tile [block_rows, block_vocab], summed over block_d at a time."""

    block_rows: int
    block_vocab: int
    block_d: int
    warps: int
    stages: int
    group_rows: int  # row tiles that share a pass over the weight: their hidden states stay in L2
    tma: bool = False


SM90_WIDE = TileConfig(128, 256, 64, warps=8, stages=3, group_rows=16, tma=True)
SM90_BIAS = SM90_WIDE._replace(stages=4)
SM90_SOFTCAP = TileConfig(128, 128, 64, warps=8, stages=4, group_rows=16, tma=True)
SM80 = TileConfig(128, 128, 64, warps=8, stages=4, group_rows=16)
UNALIGNED = TileConfig(64, 128, 32, warps=8, stages=2, group_rows=16)
FLOAT32 = TileConfig(64, 64, 16, warps=8, stages=3, group_rows=16)
INTERPRETER = TileConfig(64, 512, 128, warps=4, stages=1, group_rows=2)


def config(
    device_capability: tuple[int, int] | None, dtype: torch.dtype, d: int, bias: bool = False, softcap: bool = False
) -> TileConfig:
    """Return the tile for this head; architectures that are not in the table use that of sm_80.

    device_capability: None under the interpreter. dtype: of the operands. d: width of the hidden states. bias, softcap:
    whether the head has them.
    """
    if device_capability is None:
        return INTERPRETER
    if dtype == torch.float32:
        return FLOAT32
    if d % 16:
        return UNALIGNED
    if device_capability[0] != 9:
        return SM80
    if softcap:
        return SM90_SOFTCAP
    return SM90_BIAS if bias else SM90_WIDE


def tiles_per_part(vocab: int, block_vocab: int) -> int:
    """Return how many vocabulary tiles one program of the forward processes."""
    tiles = -(-vocab // block_vocab)
    return -(-tiles // min(tiles, VOCABULARY_PARTS))
