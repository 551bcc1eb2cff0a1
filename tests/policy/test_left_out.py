"""Skipped updates leave nothing behind, under any ZeRO stage."""

from dataclasses import replace

import pytest
import torch
from policy_helpers import assert_same_weights, make_engine, near_batch, whole_weights
from test_engine_ranks import CONFIG

from mssr.policy.loss import PolicyGradient

LOSS = PolicyGradient(CONFIG)


def updates(world, batches, kind, stage, dtype):
    """Return (weights, statistics) of three good updates with a bad one after the first; kind None: without it."""
    engine = make_engine(world=world, zero_stage=stage, dtype=dtype, budget=60, schedule="cosine", lr=1e-3)
    share = [batch.rows(world.rank * 2, world.rank * 2 + 2) for batch in batches]
    stats = [engine.update(share[0], LOSS)]
    if kind == "discarded":
        left_out = engine.discard(engine.accumulate(share[1], LOSS))
    elif kind == "not finite":
        left_out = engine.update(replace(share[1], advantage=torch.tensor([1.0, torch.inf])), LOSS)
    if kind:
        assert not left_out.applied
        assert left_out.logp.isfinite().all() and left_out.logp.any()
    stats += [engine.update(part, LOSS) for part in share[1:]]
    assert all(update.applied for update in stats)
    return whole_weights(engine), [(update.grad_norm, update.lr) for update in stats]


@pytest.mark.parametrize("kind", ["discarded", "not finite"])
@pytest.mark.parametrize(
    ("stage", "dtype"), [(0, "float32"), (1, "bfloat16"), (2, "float32"), (2, "bfloat16"), (3, "float32")]
)
def test_the_rest_of_the_run_is_as_without_it(ranks, prompts, plain, kind, stage, dtype):
    text = prompts[2]
    batches = [near_batch([prompts[0], text, prompts[4], text], [5, 9, 3, 7], plain, seed=seed) for seed in range(3)]
    expected, found = (ranks(updates, batches, which, stage, dtype)[0] for which in (None, kind))
    assert found[1] == expected[1]
    assert_same_weights(found[0], expected[0], exact=True)


def test_log_probs_of_a_batch_before_its_step(world, prompts, plain):
    batch = near_batch(prompts[:3], [5, 9, 3], plain)
    engine = make_engine(budget=60)
    before = engine.score(batch)
    accumulated = engine.accumulate(batch, LOSS)
    torch.testing.assert_close(accumulated.logp, before, atol=1e-5, rtol=0)
    assert engine.step(accumulated).applied
