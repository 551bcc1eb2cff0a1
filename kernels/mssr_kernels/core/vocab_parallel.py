"""A vocabulary split over the ranks of a process group: each holds a contiguous range of the head's rows, in rank order.

Every rank gets the same hidden states, targets and per-row arguments. The softmax sums of each row over the shards are
gathered and merged in rank order, so that all ranks hold the same bits; everything row-local then needs no communication.
The gradient of a shard of the weight is complete; the gradient of hidden is summed over the ranks.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .statistics import Partial, merge


class Shard(NamedTuple):
    group: dist.ProcessGroup
    first_column: int
    total_columns: int

    @classmethod
    def of(cls, weight: Tensor, group: dist.ProcessGroup) -> "Shard":
        """Return this rank's range of rows. One small all-gather, because shards may differ in size."""
        own = torch.tensor([weight.shape[0]], device=weight.device)
        sizes = torch.empty(dist.get_world_size(group), dtype=own.dtype, device=own.device)
        dist.all_gather_into_tensor(sizes, own, group=group)
        sizes = sizes.tolist()
        return cls(group, sum(sizes[: dist.get_rank(group)]), sum(sizes))

    @property
    def ranks(self) -> int:
        return dist.get_world_size(self.group)

    def merge(self, own: Partial) -> Partial:
        """Return the sums over all columns, [rows], from those over this rank's columns."""
        own = torch.stack(own)
        parts = own.new_empty(self.ranks, *own.shape)
        dist.all_gather_into_tensor(parts.view(-1, own.shape[1]), own, group=self.group)
        return merge(Partial(*parts.unbind(1)))

    def least(self, number: int, device: torch.device) -> int:
        """Return the smallest of the ranks' numbers."""
        number = torch.tensor(number, device=device)
        dist.all_reduce(number, dist.ReduceOp.MIN, group=self.group)
        return int(number)

    def sum_(self, tensor: Tensor):
        dist.all_reduce(tensor, group=self.group)
