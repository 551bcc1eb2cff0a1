"""Mode `sparse`: choose the vocabulary columns that a chunk's gradient needs, and the rows for which they are enough.

A sampled policy is peaked: most rows put nearly all of their probability on a few columns. The gradient by the logits of
such a row is (except for the label) proportional to its probabilities, so dropping columns that hold a mass of delta
changes it by delta |a| in the 1-norm. The choice is made for each chunk:

    1. For each row a cut, from the masses of its tiles alone: tiles below the cut hold half of what may be dropped.
    2. Sort the rows by the number of tiles above their cut; find for each column the first row that needs it. This gives
       the size U_k of the union of the columns of the first k rows, for every k at once.
    3. Take the k that costs least: k rows on U_k columns, the others on all V.
    4. Sum up, for each of the k rows, the probabilities of the columns that are left out. A row that would drop more than
       its tolerance is computed densely.

Steps 1 to 3 only decide what is worth trying; the bound rests on step 4.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.base import Tiles
from ..core.statistics import RowStatistics

# Gathering a row of the weight and adding one to dW costs about as much as so many more rows in the two products: 20 D bytes
# against 4 D FLOPs per row, at measured rates (CPU) and data-sheet rates (CUDA).
GATHER_ROWS = {"cpu": 96, "cuda": 1000}
# The active columns must save at least this share of the backward products, or the choice is not worth its passes.
LEAST_SAVING = 0.1
CUT_STEPS = 8


class Choice(NamedTuple):
    columns: Tensor  # [U] int64, ascending
    sparse_rows: Tensor  # [k] int64, positions in the chunk, ascending: these columns are enough
    dense_rows: Tensor  # [n - k] int64, ascending


def row_tolerance(tolerance: float, statistics: RowStatistics, entropy_gradient: bool, vocab: int) -> Tensor:
    """Return the mass [rows] that each row may drop, so that |dropped part of dL/dz|_1 <= tolerance (|a| + |g|).

    Without an entropy gradient it is the tolerance itself. With one, columns of mass delta contribute at most
    sum p |log p + H| <= sum p max(H, -log p) <= delta (H + log V - log delta), because the entropy of delta is largest when
    it is spread evenly. The largest delta that is small enough is the fixed point of an increasing map; the iteration
    starts below it and stays there.
    """
    delta = torch.full_like(statistics.max, tolerance)
    if entropy_gradient and tolerance:
        offset = statistics.entropy + math.log(vocab)
        delta = delta / (2 * (offset - math.log(tolerance)))
        for _ in range(6):
            delta = tolerance / (offset - delta.log()).clamp(min=1)
    return delta


def choose(tiles: Tiles, rows: Tensor, target: Tensor, statistics: RowStatistics, tolerance: Tensor) -> Choice | None:
    """Return the active vocabulary of the given rows of a chunk, or None where it does not pay.

    rows [n]: positions in the chunk. target, tolerance and statistics: of the whole chunk, [C]. target: the label's column,
    or a number outside [0, V) on a rank that does not hold it.
    """
    mass = tiles.tile_mass(statistics)
    cut, needed = _cuts(mass, tolerance)
    wanted = torch.zeros_like(needed, dtype=torch.bool).index_fill_(0, rows, True) & (needed <= len(mass) / 2)
    candidates = wanted.nonzero()[:, 0]
    if not len(candidates):
        return None
    candidates = candidates[needed[candidates].argsort(stable=True)]
    ranks = torch.zeros_like(target).index_copy_(0, candidates, torch.arange(len(candidates), device=target.device))
    first = tiles.first_ranks(cut.masked_fill(~wanted, math.inf), ranks, statistics)
    # A label is never dropped, however improbable it is.
    vocab = len(first)
    own = candidates[(target[candidates] >= 0) & (target[candidates] < vocab)]
    first.scatter_reduce_(0, target[own], ranks[own], "amin")

    union = torch.bincount(first, minlength=len(target) + 1)[: len(candidates)].cumsum(0)
    count = torch.arange(1, len(candidates) + 1, device=union.device)
    gather_rows = GATHER_ROWS.get(target.device.type, 0)
    cost = (count + gather_rows) * union + (len(rows) - count) * vocab
    k = int(cost.argmin()) + 1
    if cost[k - 1] > (1 - LEAST_SAVING) * len(rows) * vocab:
        return None
    active = first < k
    enough = tiles.dropped_mass(active, statistics) <= tolerance
    sparse = wanted & (ranks < k) & enough
    dense = torch.zeros_like(wanted).index_fill_(0, rows, True) & ~sparse
    return Choice(active.nonzero()[:, 0], sparse.nonzero()[:, 0], dense.nonzero()[:, 0])


def _cuts(mass: Tensor, tolerance: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's cut, the largest for which the tiles below it hold at most half of the tolerance, and the number
    of tiles above it, both [C]."""
    cut = torch.full_like(tolerance, math.inf)
    for step in range(CUT_STEPS):
        level = tolerance * 4.0 ** (-0.5 - step)
        below = mass.masked_fill(mass > level, 0).sum(dim=0)
        cut = torch.where(cut.isinf() & (below <= tolerance / 2), level, cut)
    # Where no level is low enough, the row is so flat that it is computed densely.
    return cut, torch.where(cut.isinf(), len(mass), (mass > cut).sum(dim=0))
