"""What a run has spent so far, and whether that is its budget: what algorithms are compared at."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from mssr.config import BudgetConfig
from mssr.distributed import World
from mssr.errors import UserError


@dataclass
class Costs:
    """Of all ranks, over the whole run, resumed or not; part of a checkpoint. Steps that a kill undid do not count.

    updates: optimiser steps, those that were left out as well.
    rollouts, tokens: responses generated for training and their tokens: the value tracker's start and groups that dynamic
        sampling dropped count, validation does not.
    seconds: the slowest rank's, of the tracker's start and of steps without their validation.
    """

    updates: int = 0
    rollouts: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def spend(self, world: World, *, updates: int, rollouts: int, tokens: int, seconds: float) -> None:
        """rollouts, tokens, seconds: this rank's; a collective."""
        generated, generated_tokens = world.sum(torch.tensor([rollouts, tokens])).tolist()
        self.updates += updates
        self.rollouts += generated
        self.tokens += generated_tokens
        self.seconds += float(world.max(torch.tensor(seconds, dtype=torch.float64)))

    def reach(self, budget: BudgetConfig) -> bool:
        """Whether one of the budget's amounts is spent; without any, never."""
        amounts = budget.model_dump(exclude_none=True)
        return any(getattr(self, name) >= amount for name, amount in amounts.items())

    def refuse_no_step(self, budget: BudgetConfig) -> None:
        """Raises:
        UserError: the value tracker's start alone spent the budget; the run would end without a step.
        """
        for name, amount in budget.model_dump(exclude_none=True).items():
            if (spent := getattr(self, name)) >= amount:
                raise UserError(
                    f"train.budget.{name} {amount:g}: the value tracker's start alone spent {spent:g}; raise it, or set "
                    "algorithm.tracker.n_init=0"
                )

    def metrics(self) -> dict[str, float]:
        """cost/updates, cost/rollouts, cost/response_tokens, cost/seconds: since the run's beginning."""
        return {
            "cost/updates": self.updates,
            "cost/rollouts": self.rollouts,
            "cost/response_tokens": self.tokens,
            "cost/seconds": self.seconds,
        }

    def state_dict(self) -> dict[str, float]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
