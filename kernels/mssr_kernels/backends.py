"""What a backend consists of, and which one runs.

A backend is the part that touches logits: statistics of rows, the weights of a chunk (`TorchTiles`, `TritonTiles`), the
gradient by a slab of logits. The modes (`loss_in_forward`, `recompute`) are written once, above it.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .inputs import HeadInputs
from .matmul import HeadMatmul
from .statistics import Partial, RowStatistics, row_statistics


class Backend(NamedTuple):
    tiles: type
    # (head, matmul, hidden rows, local target, temperature) -> sums of those rows over the columns of this rank
    row_sums: Callable[..., Partial]
    # (head, matmul, hidden rows, gradient, temperature, width) -> (columns -> dL/dx [columns, rows] in the operand dtype)
    slab_gradient: Callable[..., Callable[[slice], Tensor]]
    # of the workspace, for each column of such a slab
    slab_bytes_per_column: Callable[[HeadInputs, HeadMatmul, int], int]
    # rows whose sums fit into the workspace at once
    rows_at_once: Callable[[HeadInputs, HeadMatmul], int]

    def matmul(self, head: HeadInputs) -> HeadMatmul:
        return HeadMatmul(head.weight, head.compute_dtype, slab_bytes=head.workspace_bytes // 8)

    def statistics(self, head: HeadInputs, rows: Tensor) -> RowStatistics:
        """Statistics of the given rows, without their logits in memory."""
        matmul, sums = self.matmul(head), []
        for piece in rows.split(self.rows_at_once(head, matmul)):
            h = head.hidden.detach()[piece].to(matmul.operand_dtype)
            sums.append(self.row_sums(head, matmul, h, head.local_target(piece), head.row_temperature(piece)))
        return _over_ranks(head, Partial(*map(torch.cat, zip(*sums))))

    def chunks(
        self, head: HeadInputs, rows: Tensor, sparse: bool
    ) -> Iterator[tuple[Tensor, Tensor, RowStatistics, object]]:
        """The rows in chunks whose weights, with all that goes with them, fit into the workspace.

        sparse: leave room for what mode S gathers. Yields (row numbers [C], hidden rows [C, D] in the operand dtype,
        statistics, tiles). The next chunk overwrites the tiles.
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
            h = head.hidden.detach()[chunk].to(matmul.operand_dtype)
            sums = tiles.fill(h, head.local_target(chunk), head.row_temperature(chunk))
            yield chunk, h, _over_ranks(head, sums), tiles


def _over_ranks(head: HeadInputs, sums: Partial) -> RowStatistics:
    return row_statistics(sums if head.shard is None else head.shard.merge(sums))


def rows_per_chunk(rows: int, most: int, aligned: int) -> int:
    """Chunks of nearly equal size, in multiples of `aligned` rows where there are so many."""
    if most >= aligned:
        most -= most % aligned
    size = -(-rows // max(1, -(-rows // most)))
    return min(rows, most, -(-size // aligned) * aligned)


def fitting(head: HeadInputs, unit_bytes: int, fixed_bytes: int, unit: str) -> int:
    """How many units of `unit_bytes` the workspace holds beside `fixed_bytes`."""
    count = (head.workspace_bytes - fixed_bytes) // max(unit_bytes, 1)
    if count < 1:
        raise ValueError(
            f"workspace_bytes = {head.workspace_bytes} does not hold {unit} ({unit_bytes} bytes, and {fixed_bytes} of "
            f"scratch): pass at least {2 * (unit_bytes + fixed_bytes)}"
        )
    return count
