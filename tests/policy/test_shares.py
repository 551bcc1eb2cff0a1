"""How a step's global batch is split over ranks, and the collectives that gather it again."""

import pytest
import torch
from policy_helpers import random_batch

from mssr.batch import GradedRollouts
from mssr.distributed import World
from mssr.errors import UserError
from mssr.training.shares import Shares

CPU = torch.device("cpu")


def shares(size, batch_size=24, responses_per_update=12):
    return [Shares(batch_size, responses_per_update, World(rank, size, CPU)) for rank in range(size)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 12])
def test_slots_of_all_ranks_are_the_batch(size):
    slots = [slot for share in shares(size) for slot in share.slots]
    assert sorted(slots) == list(range(24))
    assert {len(share.slots) for share in shares(size)} == {24 // size}


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
def test_each_update_sees_the_same_rows_on_any_number_of_ranks(prompts, size):
    batch = random_batch([prompts[slot % 6] for slot in range(24)], [1] * 24)
    batch.tokens[:] = torch.arange(24)[:, None]
    seen = [set(), set()]
    for share in shares(size):
        own = pick(batch, share.slots)
        updates = share.updates(own)
        assert [len(update) for update in updates] == [12 // size] * 2
        assert torch.equal(torch.cat([update.tokens for update in updates]), own.tokens)
        for rows, update in zip(seen, updates):
            rows.update(update.tokens.flatten().tolist())
    assert seen == [set(range(12)), set(range(12, 24))]


def pick(batch, slots):
    """Return the slots' rows as a batch."""
    parts = {name: getattr(batch, name)[slots] for name in vars(batch) if name != "prompts"}
    return type(batch)(prompts=tuple(batch.prompts[slot] for slot in slots), **parts)


def gathered(world, batch_size, responses_per_update):
    share = Shares(batch_size, responses_per_update, world)
    mine = torch.tensor(share.slots)
    whole = share.gather(mine * 10)
    return whole, share.gather_list([f"slot {slot}" for slot in share.slots]), share.own(whole) == mine * 10


@pytest.mark.parametrize("shape", [(8, 8), (8, 4), (12, 4), (8, 2)])
def test_gather_restores_the_global_order(ranks, shape):
    for whole, texts, own in ranks(gathered, *shape):
        assert whole.tolist() == [10 * slot for slot in range(shape[0])]
        assert texts == [f"slot {slot}" for slot in range(shape[0])]
        assert own.all()


def test_one_rank_gathers_what_it_has():
    whole, texts, own = gathered(World(0, 1, CPU), 8, 4)
    assert whole.tolist() == [10 * slot for slot in range(8)] and texts[3] == "slot 3" and own.all()


def test_an_update_that_ranks_cannot_share():
    with pytest.raises(UserError, match=r"12.*5 ranks"):
        Shares(24, 12, World(0, 5, CPU))


def outcomes_of(world, prompts):
    share = Shares(8, 4, world)
    whole = random_batch([prompts[slot % 6] for slot in range(8)], [3, 1, 4, 1, 5, 9, 2, 6])
    slots = torch.tensor(share.slots)
    own = pick(whole, share.slots)
    graded = GradedRollouts(
        own.prompts, own.tokens, own.mask, own.logp, torch.zeros(len(own)), torch.zeros(len(own)),
        reward=slots / 8, correct=slots / 10, graded=torch.tensor([slot != 7 for slot in share.slots]),
        masked=torch.tensor([slot in (2, 5) for slot in share.slots]), parts=({},) * len(own), texts=("",) * len(own),
    )  # fmt: skip
    return share.outcomes(graded, slots / 16, 2, success_weight=0.5)


def test_outcomes_are_in_the_global_order_and_masked_responses_have_no_tokens(ranks, prompts):
    for outcomes in (*ranks(outcomes_of, prompts), outcomes_of(World(0, 1, CPU), prompts)):
        assert outcomes.reward.tolist() == [slot / 8 for slot in range(8)]
        assert outcomes.success.tolist() == pytest.approx([slot / 10 for slot in range(8)])
        assert outcomes.graded.tolist() == [True] * 7 + [False]
        assert outcomes.lengths.tolist() == [3, 1, 0, 1, 5, 0, 2, 0]
        assert outcomes.value.tolist() == [slot / 16 for slot in range(8)] and outcomes.group == 2
        assert outcomes.baseline.tolist() == [slot / 32 for slot in range(8)]


def collectives(world):
    mine = torch.tensor([1.5, -2.0]) * (world.rank + 1)
    result = {
        "sum": world.sum(mine),
        "integers": world.sum(torch.tensor(2**40 + world.rank)),
        "max": world.max(mine),
        "gather": world.gather({"rank": world.rank, "values": [1] * world.rank}),
        "is_main": world.is_main,
        "argument": mine,
    }
    world.gather(None)
    return result


def test_collectives(ranks):
    for rank, found in enumerate(ranks(collectives)):
        assert found["sum"].tolist() == [4.5, -6.0]
        assert int(found["integers"]) == 2**41 + 1
        assert found["max"].tolist() == [3.0, -2.0]
        assert found["gather"] == [{"rank": 0, "values": []}, {"rank": 1, "values": [1]}]
        assert found["is_main"] == (rank == 0)
        assert found["argument"].tolist() == [1.5 * (rank + 1), -2.0 * (rank + 1)]  # unchanged


def test_collectives_of_one():
    found = collectives(World(0, 1, CPU))
    assert found["sum"].tolist() == found["max"].tolist() == [1.5, -2.0]
    assert found["gather"] == [{"rank": 0, "values": []}] and found["is_main"]
