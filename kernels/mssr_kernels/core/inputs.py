"""The validated arguments of a call, as the modes and backends see them."""

from typing import NamedTuple

import torch
from torch import Tensor

from .statistics import PerRow
from .vocab_parallel import Shard

WORKSPACE_BYTES = 256 << 20  # default of the public functions


class HeadInputs(NamedTuple):
    """The head, the tokens it scores, and the options of doing so."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D], or this rank's rows of it
    bias: Tensor | None  # [V]
    target: Tensor  # [N] int64, over the whole vocabulary
    temperature: PerRow = 1.0
    softcap: float | None = None
    ignore_index: int = -100
    workspace_bytes: int = WORKSPACE_BYTES
    shard: Shard | None = None  # None: this rank holds the whole vocabulary

    @property
    def compute_dtype(self) -> torch.dtype:
        return compute_dtype(self.hidden)

    @property
    def total_vocab(self) -> int:
        return self.weight.shape[0] if self.shard is None else self.shard.total_columns

    def kept_rows(self) -> Tensor:
        """Row numbers that are not ignored, [K] int64."""
        return (self.target != self.ignore_index).nonzero()[:, 0]

    def local_target(self, rows: Tensor) -> Tensor:
        """Columns of the labels in `weight`; outside [0, V) where another rank holds them."""
        target = self.target[rows]
        return target if self.shard is None else target - self.shard.first_column

    def row_temperature(self, rows: Tensor) -> PerRow:
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
    """Dtype of statistics and accumulators: float32, or float64 when the inputs are float64 (for oracles)."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32
