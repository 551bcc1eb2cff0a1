"""What an algorithm turns into advantages: the rewards of a whole step, and what they are compared with."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Outcomes:
    """What a step's B responses earned, of all ranks, a prompt's responses side by side.

    reward: [B] float32.
    baseline: [B] float32, the tracker's values from before it saw these rewards; None without a tracker.
    lengths: [B] int64, tokens of each response that count in the loss: 0 for a masked one.
    group: responses of a prompt; divides B.
    """

    reward: Tensor
    baseline: Tensor | None
    lengths: Tensor
    group: int
