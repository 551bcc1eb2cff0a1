"""Costs of a run, and its budget: algorithms are compared at equal costs."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from mssr.config.schema import BudgetConfig
from mssr.distributed import World
from mssr.errors import UserError


@dataclass
class Costs:
    """Totals of all ranks over the whole run; part of a checkpoint. Steps lost to a kill do not count.

    updates: optimiser steps, skipped ones included.
    rollouts, tokens: responses generated for training and their tokens, including the value tracker's first rollouts and
        groups dropped by dynamic sampling, but not validation.
    seconds: of the slowest rank, for the tracker's first rollouts and for the steps, without validation.
    """

    updates: int = 0
    rollouts: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def spend(self, world: World, *, updates: int, rollouts: int, tokens: int, seconds: float) -> None:
        """Add costs. rollouts, tokens, seconds: of this rank. Collective."""
        generated, generated_tokens = world.sum(torch.tensor([rollouts, tokens])).tolist()
        self.updates += updates
        self.rollouts += generated
        self.tokens += generated_tokens
        self.seconds += float(world.max(torch.tensor(seconds, dtype=torch.float64)))

    def reach(self, budget: BudgetConfig) -> bool:
        """Return whether one of the budget's amounts is spent; False for an empty budget."""
        amounts = budget.model_dump(exclude_none=True)
        return any(getattr(self, name) >= amount for name, amount in amounts.items())

    def refuse_no_step(self, budget: BudgetConfig) -> None:
        """Refuse a budget that the value tracker's first rollouts have already spent.

        Raises:
            UserError: the run would end without a step.
        """
        for name, amount in budget.model_dump(exclude_none=True).items():
            if (spent := getattr(self, name)) >= amount:
                raise UserError(
                    f"train.budget.{name} {amount:g}: the value tracker's first rollouts spent {spent:g}; raise it, or set "
                    "algorithm.tracker.n_init=0"
                )

    def metrics(self) -> dict[str, float]:
        """Return cost/updates, cost/rollouts, cost/response_tokens, cost/seconds since the start of the run."""
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
