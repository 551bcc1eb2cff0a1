"""What a backend has to provide: the passes over logits.

The modes (`modes.loss_in_forward`, `modes.recompute`) are written once, on top of these two classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..core.inputs import HeadInputs
from ..core.statistics import Partial, PerRow, RowGradient, RowStatistics, row_statistics
from .matmul import HeadMatmul


class Tiles(ABC):
    """The softmax weights of a chunk of tokens, [V, C], for up to `capacity` tokens. Each `fill` overwrites the last.

    A weight is e^(z - max of its tile), so that p = weight e^(max of the tile - max of the row - log_sum).
    """

    aligned_rows: int  # chunks are multiples of this, where there are so many rows
    max: Tensor  # [tiles, C], of the logits of each tile of columns
    sum: Tensor  # [tiles, C], of its weights

    @staticmethod
    @abstractmethod
    def bytes_needed(head: HeadInputs, matmul: HeadMatmul, sparse: bool) -> tuple[int, int]:
        """Return (bytes per token, fixed bytes) of workspace. sparse: include the buffers of mode `sparse`."""

    @abstractmethod
    def fill(self, h: Tensor, target: Tensor, temperature: PerRow) -> Partial:
        """Compute the weights of h [C, D] and return the sums of each row."""

    @abstractmethod
    def gradient(self, rows: Tensor | None, gradient: RowGradient) -> tuple[Tensor, Tensor | None]:
        """Return dL/dx [V, k] of the given rows (ascending; None: all), and the row of each column (None: in order).

        dL/dx is in the operand dtype and overwrites the weights. `gradient` is in the order of `rows`.
        """

    # For mode `sparse`: which columns hold the probability, and the gradient of these alone.

    def tile_mass(self, statistics: RowStatistics) -> Tensor:
        """Return the probability of each (tile, row), [tiles, C]."""
        return (self.max - statistics.max).sub_(statistics.log_sum).exp_().mul_(self.sum)

    @abstractmethod
    def first_ranks(self, cut: Tensor, ranks: Tensor, statistics: RowStatistics) -> Tensor:
        """Return [V] int64: for each column the smallest `ranks[row]` over the rows with p > cut[row], or C if there is none.

        cut, ranks: [C].
        """

    @abstractmethod
    def dropped_mass(self, active: Tensor, statistics: RowStatistics) -> Tensor:
        """Return the probability, per row, of the columns that are not `active` [V] bool; [C]."""

    @abstractmethod
    def compact_gradient(self, columns: Tensor, rows: Tensor, gradient: RowGradient) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield dL/dx of these columns and rows piece by piece: columns [n], and [n, k] in the operand dtype.

        The columns ascend and contain the labels of the rows that are in this vocabulary.
        """


class Backend(ABC):
    tiles: type[Tiles]

    @abstractmethod
    def row_sums(self, head: HeadInputs, matmul: HeadMatmul, h: Tensor, target: Tensor, temperature: PerRow) -> Partial:
        """Return the sums of the rows h [C, D] over this rank's columns. target [C]: columns of this rank."""

    @abstractmethod
    def rows_at_once(self, head: HeadInputs, matmul: HeadMatmul) -> int:
        """Return how many rows `row_sums` can take within the workspace."""

    @abstractmethod
    def slab_gradient(
        self, head: HeadInputs, matmul: HeadMatmul, h: Tensor, gradient: RowGradient, temperature: PerRow, width: int
    ) -> Callable[[slice], Tensor]:  # fmt: skip
        """Return the function from up to `width` columns to dL/dx [columns, C] in the operand dtype, for rows h [C, D].

        Each call overwrites the result of the last.
        """

    @abstractmethod
    def slab_bytes_per_column(self, head: HeadInputs, matmul: HeadMatmul, rows: int) -> int:
        """Return the workspace that each column of such a slab takes."""

    def matmul(self, head: HeadInputs) -> HeadMatmul:
        return HeadMatmul(head.weight, head.compute_dtype, slab_bytes=head.workspace_bytes // 8)

    def statistics(self, head: HeadInputs, rows: Tensor) -> RowStatistics:
        """Return the statistics of the given rows, computed without their logits in memory."""
        matmul, sums = self.matmul(head), []
        for piece in rows.split(self.rows_at_once(head, matmul)):
            h = head.hidden[piece].to(matmul.operand_dtype)
            sums.append(self.row_sums(head, matmul, h, head.local_target(piece), head.row_temperature(piece)))
        return _over_ranks(head, Partial(*map(torch.cat, zip(*sums))))

    def chunks(
        self, head: HeadInputs, rows: Tensor, sparse: bool
    ) -> Iterator[tuple[Tensor, Tensor, RowStatistics, Tiles]]:
        """Yield the rows in chunks whose weights, with all that goes with them, fit into the workspace.

        sparse: leave room for what mode `sparse` gathers. A chunk is (row numbers [C], hidden rows [C, D] in the operand
        dtype, statistics, tiles). The next chunk overwrites the tiles.
        """
        if not len(rows):
            return
        matmul = self.matmul(head)
        most = fitting(head, *self.tiles.bytes_needed(head, matmul, sparse), "one row of logits")
        if head.shard is not None:
            most = head.shard.least(most, rows.device)
        size = rows_per_chunk(len(rows), most, self.tiles.aligned_rows)
        tiles = self.tiles(head, matmul, size)
        for chunk in rows.split(size):
            h = head.hidden[chunk].to(matmul.operand_dtype)
            sums = tiles.fill(h, head.local_target(chunk), head.row_temperature(chunk))
            yield chunk, h, _over_ranks(head, sums), tiles


def _over_ranks(head: HeadInputs, sums: Partial) -> RowStatistics:
    return row_statistics(sums if head.shard is None else head.shard.merge(sums))


def rows_per_chunk(rows: int, most: int, aligned: int) -> int:
    """Return the size of nearly equal chunks of at most `most` rows, in multiples of `aligned` where there are so many."""
    if most >= aligned:
        most -= most % aligned
    size = -(-rows // max(1, -(-rows // most)))
    return min(rows, most, -(-size // aligned) * aligned)


def fitting(head: HeadInputs, unit_bytes: int, fixed_bytes: int, unit: str) -> int:
    """Return how many units of `unit_bytes` the workspace holds beside `fixed_bytes`."""
    count = (head.workspace_bytes - fixed_bytes) // max(unit_bytes, 1)
    if count < 1:
        raise ValueError(
            f"workspace_bytes = {head.workspace_bytes} does not hold {unit} ({unit_bytes} bytes, and {fixed_bytes} of "
            f"scratch): pass at least {2 * (unit_bytes + fixed_bytes)}"
        )
    return count
