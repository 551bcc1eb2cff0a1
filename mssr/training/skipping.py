"""Steps that are left out instead of ruining the weights: a log-prob gap too large, a gradient that is not finite."""

import math
from typing import Any

from mssr.errors import Diverged
from mssr.policy.engine import UpdateStats
from mssr.rollout.gap import LogpGap, describe_large_gap


class SkippedSteps:
    """Counts them. One is bad luck; many in a row are a run that has gone wrong.

    limit: how many in a row may be left out (train.max_skipped_steps). max_gap: rollout.max_gap, for the message.
    """

    def __init__(self, limit: int, max_gap: float) -> None:
        self._limit, self._max_gap = limit, max_gap
        self._total = self._in_a_row = 0

    def state_dict(self) -> dict[str, int]:
        return {"total": self._total, "in_a_row": self._in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._total, self._in_a_row = state["total"], state["in_a_row"]

    def observe(self, gap: LogpGap, updates: list[UpdateStats]) -> str | None:
        """Count the step; return why updates of it were left out, or None."""
        left_out = sum(not update.applied for update in updates)
        self._total += left_out > 0
        self._in_a_row = self._in_a_row + 1 if left_out else 0
        if not left_out:
            return None
        if not gap.within(self._max_gap):
            return f"left out, {describe_large_gap(gap, self._max_gap)}"
        return (
            f"{left_out} of {len(updates)} updates left out, their gradients are not finite; lower train.optimizer.lr, "
            "and look at the rewards and log-probs of the last steps"
        )

    def refuse_to_go_on(self, step: int, gap: LogpGap, reason: str) -> None:
        """Raises:
        Diverged: more steps in a row than may be, or the next one can be no better: weights are broken already.
        """
        if not math.isfinite(gap.mean):
            raise Diverged(
                f"step {step}: rollout and trainer disagree: log-probs became NaN or infinite, in the policy (it diverged: "
                "lower train.optimizer.lr, go on from the last checkpoint with --resume) or in the sampler (check its "
                "weight sync)"
            )
        if self._in_a_row > self._limit:
            again = f", after {self._limit} steps that were left out (train.max_skipped_steps)" if self._limit else ""
            raise Diverged(f"step {step}: {reason}{again}")

    def metrics(self) -> dict[str, float]:
        """train/skipped_steps: of the whole run."""
        return {"train/skipped_steps": self._total}
