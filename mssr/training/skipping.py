"""Skipped steps: updates with too large a log-prob gap or a non-finite gradient are not applied."""

import math
from typing import Any

from mssr.errors import Diverged
from mssr.policy.engine import UpdateStats
from mssr.rollout.gap import LogpGap, describe_large_gap


class SkippedSteps:
    """Counts skipped steps and stops a run that skips too many in a row.

    limit: train.max_skipped_steps. max_gap: rollout.max_gap.
    """

    def __init__(self, limit: int, max_gap: float) -> None:
        self._limit, self._max_gap = limit, max_gap
        self._total = self._in_a_row = 0

    def state_dict(self) -> dict[str, int]:
        return {"total": self._total, "in_a_row": self._in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._total, self._in_a_row = state["total"], state["in_a_row"]

    def observe(self, gap: LogpGap, updates: list[UpdateStats]) -> str | None:
        """Count the step; return why updates of it were skipped, or None."""
        skipped = sum(not update.applied for update in updates)
        self._total += skipped > 0
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        if not skipped:
            return None
        if not gap.within(self._max_gap):
            return f"skipped: {describe_large_gap(gap, self._max_gap)}"
        return (
            f"{skipped} of {len(updates)} updates skipped: gradients are not finite; lower train.optimizer.lr, "
            "and look at the rewards and log-probs of the last steps"
        )

    def refuse_to_go_on(self, step: int, gap: LogpGap, reason: str) -> None:
        """Stop the run if it cannot recover.

        Raises:
            Diverged: too many steps in a row were skipped, or the weights are already broken.
        """
        if not math.isfinite(gap.mean):
            raise Diverged(
                f"step {step}: rollout and trainer disagree: log-probs became NaN or infinite, in the policy (it diverged: "
                "lower train.optimizer.lr, continue from the last checkpoint with --resume) or in the sampler (check its "
                "weight sync)"
            )
        if self._in_a_row > self._limit:
            again = f", after {self._limit} skipped steps (train.max_skipped_steps)" if self._limit else ""
            raise Diverged(f"step {step}: {reason}{again}")

    def metrics(self) -> dict[str, float]:
        """Return train/skipped_steps, the total of the run."""
        return {"train/skipped_steps": self._total}
