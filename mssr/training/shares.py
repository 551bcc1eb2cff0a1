"""How the global batch is split over ranks."""

import torch
from torch import Tensor

from mssr.algorithms.advantages import Outcomes
from mssr.batch import GradedRollouts, UpdateBatch
from mssr.distributed import World
from mssr.errors import UserError


class Shares:
    """Splits a step's global batch over ranks so that each optimiser step sees the same rows on any number of ranks.

    The batch is cut into updates, and each update into one contiguous share per rank: update u of rank r is
    the slots u * responses_per_update + [r * share, (r + 1) * share).

    key: the configuration key of `responses_per_update`, for the error.
    slots: this rank's positions in the global batch, in the order of its updates.
    """

    def __init__(
        self, batch_size: int, responses_per_update: int, world: World, key: str = "train.responses_per_update"
    ) -> None:
        if responses_per_update % world.size:
            raise UserError(f"{key} {responses_per_update} is not a multiple of the {world.size} ranks")
        self._world = world
        self._share = responses_per_update // world.size
        slots = torch.arange(batch_size).view(-1, world.size, self._share)
        self.slots: list[int] = slots[:, world.rank].flatten().tolist()
        self._order = slots.transpose(0, 1).flatten()  # global slot of each gathered row

    def updates(self, batch: UpdateBatch) -> list[UpdateBatch]:
        """Return this rank's rows of each optimiser step."""
        return [batch.rows(start, start + self._share) for start in range(0, len(batch), self._share)]

    def gather(self, values: Tensor) -> Tensor:
        """Gather [B_rank] from every rank to [B] in global order, on every rank."""
        gathered = torch.cat(self._world.gather(values))
        whole = torch.empty_like(gathered)
        whole[self._order] = gathered
        return whole

    def gather_list(self, values: list) -> list:
        """Gather a list of any objects, as `gather`."""
        gathered = [value for part in self._world.gather(values) for value in part]
        whole = [None] * len(gathered)
        for slot, value in zip(self._order.tolist(), gathered):
            whole[slot] = value
        return whole

    def own(self, whole: Tensor) -> Tensor:
        """Return this rank's [B_rank] of [B] in global order."""
        return whole[self.slots]

    def outcomes(
        self, rollouts: GradedRollouts, value: Tensor | None, group: int, success_weight: float = 1.0
    ) -> Outcomes:
        """Gather the outcomes of all ranks' responses.

        value: [B_rank], the tracker's. group: responses per prompt, in adjacent slots.
        """
        return Outcomes(
            reward=self.gather(rollouts.reward),
            success=self.gather(rollouts.correct),
            graded=self.gather(rollouts.graded),
            value=None if value is None else self.gather(value),
            lengths=self.gather(rollouts.loss_mask.sum(1)),
            group=group,
            success_weight=success_weight,
        )
