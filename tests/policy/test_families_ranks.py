"""Model families on two ranks, one with images and one without, match one rank with the whole batch."""

import pytest
from family_helpers import family_dir, family_prompts
from policy_helpers import assert_same_weights, make_engine, random_batch, whole_weights

from mssr.policy.loss import CrossEntropy


def imitate(world, batches, **settings):
    """Make one supervised update on this rank's half of each batch. Return the unsharded weights."""
    engine = make_engine(world=world, **settings)
    for batch in batches:
        share = len(batch) // world.size
        engine.update(batch.rows(world.rank * share, (world.rank + 1) * share), CrossEntropy())
    return whole_weights(engine)


@pytest.mark.parametrize(
    "family, settings",
    [
        ("qwen3_vl", {"zero_stage": 2}),
        ("qwen3_vl", {"zero_stage": 3}),
        ("qwen3_vl", {"zero_stage": 3, "gradient_checkpointing": True}),
        ("llama", {"zero_stage": 3}),
    ],
)
def test_two_ranks_equal_one(ranks, world, family, settings):
    prompts = family_prompts(family)
    batches = [
        random_batch([prompts[0], prompts[4], prompts[2], prompts[2]], [5, 9, 3, 7], seed=1),
        random_batch([prompts[2], prompts[2], prompts[1], prompts[5]], [2, 11, 6, 4], seed=2),
    ]
    expected = imitate(world, batches, path=family_dir(family))
    found, other = ranks(imitate, batches, path=family_dir(family), budget=48, **settings)
    assert_same_weights(found, expected)
    assert_same_weights(other, found, exact=True)
