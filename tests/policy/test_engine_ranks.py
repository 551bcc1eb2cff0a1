"""Two ranks with unequal work match one rank with the whole batch."""

import pytest
import torch
from policy_helpers import (
    EagerTrainer,
    assert_same_weights,
    load_engine,
    make_engine,
    near_batch,
    random_batch,
    save_engine,
    weights,
)

from mssr.policy.loss import PolicyGradient
from mssr_kernels import PolicyLossConfig

CONFIG = PolicyLossConfig(kl_coef=0.05, entropy_coef=0.01, tis_cap=2.0)


def global_batches(prompts, plain):
    """Return four batches: images and long rows on rank 0, short text on rank 1; vice versa; no images; images on both."""
    text = prompts[2]
    return [
        near_batch([*prompts[3:], prompts[0], text, text, text, text], [9, 12, 7, 20, 1, 2, 3, 2], plain, seed=1),
        near_batch([text, text, text, text, *prompts[3:], prompts[0]], [1, 2, 3, 2, 30, 12, 7, 20], plain, seed=2),
        near_batch([text] * 4, [5, 25, 1, 2], plain, seed=3),
        near_batch([prompts[0], text, prompts[1], text], [5, 6, 7, 8], plain, seed=4),
    ]


def train(world, batches, **settings):
    """Train on this rank's contiguous share of each batch. Return (weights, stats)."""
    engine = make_engine(world=world, **settings)
    stats = []
    for batch in batches:
        share = len(batch) // world.size
        stats.append(engine.update(batch.rows(world.rank * share, (world.rank + 1) * share), PolicyGradient(CONFIG)))
    return weights(engine), stats


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
@pytest.mark.parametrize("budget", [100, 180])
def test_two_ranks_equal_one(ranks, world, model_dir, prompts, plain, zero_stage, budget):
    batches = global_batches(prompts, plain)
    settings = {"path": model_dir, "zero_stage": zero_stage, "budget": budget}
    expected, one = train(world, batches, **settings)
    (first, stats_0), (second, stats_1) = ranks(train, batches, **settings)
    assert_same_weights(first, expected)
    assert_same_weights(second, first, exact=True)
    for alone, here, there in zip(one, stats_0, stats_1):
        assert here.metrics == there.metrics
        assert here.metrics == pytest.approx(alone.metrics, rel=1e-3, abs=1e-5)
        assert here.grad_norm == pytest.approx(alone.grad_norm, rel=1e-3) == pytest.approx(there.grad_norm, rel=1e-3)
        assert here.lr == there.lr == alone.lr
        torch.testing.assert_close(torch.cat([here.logp, there.logp]), alone.logp, atol=5e-5, rtol=0)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_two_ranks_equal_the_written_out_update(ranks, model_dir, prompts, plain, gradient_checkpointing):
    batches = global_batches(prompts, plain)
    eager = EagerTrainer(model_dir, grad_clip=1.0)
    for batch in batches:
        eager.update(batch, CONFIG)
    settings = {"zero_stage": 2, "budget": 100, "gradient_checkpointing": gradient_checkpointing}
    (found, _), _ = ranks(train, batches, path=model_dir, **settings)
    assert_same_weights(found, eager.weights())


def update_uneven(world, batch, **settings):
    engine = make_engine(world=world, **settings)
    engine.update(batch.rows(*[(0, 3), (3, 4)][world.rank]), PolicyGradient(CONFIG))
    return weights(engine)


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_a_rank_out_of_rows_waits_for_the_other(ranks, model_dir, prompts, plain, zero_stage):
    """With one row per micro-batch, one rank has three and the other has one."""
    batch = near_batch(prompts[:4], [4, 6, 3, 8], plain)
    eager = EagerTrainer(model_dir, grad_clip=1.0)
    eager.update(batch, CONFIG)
    for found in ranks(update_uneven, batch, path=model_dir, zero_stage=zero_stage, budget=1):
        assert_same_weights(found, eager.weights())


def score_own(world, batches, **settings):
    return make_engine(world=world, **settings).score(batches[world.rank])


def test_ranks_score_on_their_own(ranks, world, model_dir, prompts):
    """They have different numbers of micro-batches and do not wait for each other."""
    batches = [random_batch(prompts, [5, 9, 3, 7, 1, 12]), random_batch(prompts[2:3], [2])]
    found = ranks(score_own, batches, path=model_dir, budget=70)
    for scores, batch in zip(found, batches):
        torch.testing.assert_close(scores, make_engine(budget=1000).score(batch), atol=1e-5, rtol=0)


def save_and_go_on(world, batches, folder, **settings):
    """Return weights of an uninterrupted run, and of one that was saved after the first update and loaded by a new engine."""
    share = [batch.rows(world.rank * len(batch) // 2, (world.rank + 1) * len(batch) // 2) for batch in batches]
    first = make_engine(world=world, **settings)
    first.update(share[0], PolicyGradient(CONFIG))
    save_engine(first, folder)
    second = make_engine(world=world, **settings)
    load_engine(second, folder)
    for engine in (first, second):
        for batch in share[1:]:
            engine.update(batch, PolicyGradient(CONFIG))
    return weights(first), weights(second)


def test_a_run_of_two_ranks_resumes_exactly(ranks, model_dir, prompts, plain, tmp_path):
    batches = global_batches(prompts, plain)
    for uninterrupted, resumed in ranks(save_and_go_on, batches, tmp_path, path=model_dir, zero_stage=2):
        assert_same_weights(resumed, uninterrupted, exact=True)
