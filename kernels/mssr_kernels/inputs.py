"""The validated arguments as the backends see them."""

from typing import NamedTuple

import torch
from torch import Tensor

from .vocab_parallel import Shard


class HeadInputs(NamedTuple):
    """The head and the tokens it scores."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D], or this rank's rows of it
    bias: Tensor | None  # [V]
    target: Tensor  # [N] int64, over the whole vocabulary
    temperature: Tensor | float  # [N] or a number
    softcap: float | None
    ignore_index: int
    workspace_bytes: int
    shard: Shard | None  # None: this rank holds the whole vocabulary

    @property
    def compute_dtype(self) -> torch.dtype:
        """Statistics and accumulators: float32, or float64 when the inputs are (for oracles)."""
        return compute_dtype(self.hidden)

    @property
    def total_vocab(self) -> int:
        return self.weight.shape[0] if self.shard is None else self.shard.total_columns

    def kept_rows(self) -> Tensor:
        return (self.target != self.ignore_index).nonzero()[:, 0]

    def local_target(self, rows: Tensor) -> Tensor:
        """Columns of the labels in `weight`; outside [0, V) where another rank holds them."""
        target = self.target[rows]
        return target if self.shard is None else target - self.shard.first_column

    def row_temperature(self, rows: Tensor) -> Tensor | float:
        if isinstance(self.temperature, Tensor):
            return self.temperature[rows].to(self.compute_dtype)
        return self.temperature


class RowInputs(NamedTuple):
    """What the loss of a row depends on besides its logits, each [N] (or absent), without gradient."""

    advantage: Tensor
    old_logp: Tensor | None
    ref_logp: Tensor | None
    rollout_logp: Tensor | None
    shaping_entropy: Tensor | None

    def take(self, rows: Tensor, dtype: torch.dtype) -> "RowInputs":
        return RowInputs(*(None if field is None else field[rows].to(dtype) for field in self))


def compute_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32
