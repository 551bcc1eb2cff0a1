"""The engine's updates equal those of plain transformers, autograd and torch's AdamW."""

import math
from dataclasses import replace

import pytest
import torch
from policy_helpers import (
    EagerTrainer,
    assert_same_weights,
    load_engine,
    make_engine,
    model_dir,
    near_batch,
    plain_distribution,
    plain_logp,
    random_batch,
    save_engine,
    weights,
)

from mssr.batch import Sequences, UpdateBatch
from mssr.errors import UserError
from mssr.policy.loading import load_frozen_policy
from mssr.policy.loss import CrossEntropy, PolicyGradient
from mssr_kernels import PolicyLossConfig

EVERYTHING = PolicyLossConfig(kl_coef=0.05, entropy_coef=0.01, tis_cap=2.0)
LENGTHS = [5, 9, 3, 7, 1, 12]

pytestmark = pytest.mark.usefixtures("world")


def batches(prompts, plain, temperature=1.0):
    """Return batches of three steps, of different sizes; the second has no image."""
    return [
        near_batch(prompts, LENGTHS, plain, temperature=temperature, seed=1),
        near_batch([prompts[2]] * 2, [4, 8], plain, temperature=temperature, seed=2),
        near_batch(prompts[3:], [2, 6, 3], plain, temperature=temperature, seed=3),
    ]


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
@pytest.mark.parametrize(("temperature", "grad_clip"), [(1.0, 1000.0), (0.7, 0.05)])
def test_updates_equal_the_written_out_ones(model_dir, prompts, plain, zero_stage, temperature, grad_clip):
    settings = {"temperature": temperature, "grad_clip": grad_clip, "weight_decay": 1.0}
    engine = make_engine(zero_stage=zero_stage, **settings)
    eager = EagerTrainer(model_dir, **settings)
    for batch in batches(prompts, plain, temperature):
        with torch.no_grad():
            expected_logp = plain_logp(eager.model, batch, temperature).float()
        stats = engine.update(batch, PolicyGradient(EVERYTHING))
        assert stats.grad_norm == pytest.approx(eager.update(batch, EVERYTHING), rel=1e-3)
        torch.testing.assert_close(stats.logp, expected_logp, atol=5e-5, rtol=0)
        assert_same_weights(weights(engine), eager.weights())


def test_metrics_are_means_over_tokens(prompts, plain):
    batch = near_batch(prompts, LENGTHS, plain)
    metrics = make_engine(budget=80).update(batch, PolicyGradient(EVERYTHING)).metrics
    own = plain_logp(plain, batch)[batch.mask]
    delta = batch.ref_logp[batch.mask] - own
    ratio = torch.exp(own - batch.old_logp[batch.mask])
    dist = torch.cat([plain_distribution(plain, p, batch.response(row)) for row, p in enumerate(prompts)])
    assert metrics["kl"] == pytest.approx(float((delta.exp() - delta - 1).mean()), rel=1e-4)
    assert metrics["entropy"] == pytest.approx(float(-(dist.exp() * dist).sum(-1).mean()), rel=1e-4)
    assert metrics["ratio"] == pytest.approx(float(ratio.mean()), rel=1e-4)
    assert metrics["ratio_max"] == pytest.approx(float(ratio.max()), rel=1e-4)
    assert 0 < metrics["clip_fraction"] < 1


@pytest.mark.parametrize("budget", [1, 70, 130, 10_000])
def test_the_cut_into_micro_batches_changes_nothing(prompts, plain, budget):
    results = []
    for tokens in (200, budget):
        engine = make_engine(budget=tokens)
        stats = [engine.update(batch, PolicyGradient(EVERYTHING)) for batch in batches(prompts, plain)]
        results.append((weights(engine), stats))
    (expected, expected_stats), (found, found_stats) = results
    assert_same_weights(found, expected)
    for one, other in zip(found_stats, expected_stats):
        assert one.metrics == pytest.approx(other.metrics, rel=1e-3, abs=1e-5)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)
        torch.testing.assert_close(one.logp, other.logp, atol=5e-5, rtol=0)


def test_supervised_learning_is_cross_entropy(model_dir, prompts, plain):
    engine = make_engine()
    eager = EagerTrainer(model_dir, grad_clip=1.0)
    before = None
    for batch in batches(prompts, plain):
        demonstration = Sequences(batch.prompts, batch.tokens, batch.mask)
        stats = engine.update(demonstration, CrossEntropy())
        assert stats.grad_norm == pytest.approx(eager.imitate(demonstration), rel=1e-3)
        assert_same_weights(weights(engine), eager.weights())
        before = before or (demonstration, stats.logp)
    demonstration, logp = before
    assert engine.score(demonstration).sum() > logp.sum()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [1, 1, 1, 1]),
        ({"warmup_updates": 3}, [1 / 3, 2 / 3, 1, 1]),
        ({"schedule": "cosine", "total_updates": 4}, [0.5 + 0.5 * math.cos(math.pi * k / 4) for k in range(4)]),
        (
            {"schedule": "cosine", "total_updates": 4, "warmup_updates": 2},
            [0.5, *(0.5 + 0.5 * math.cos(math.pi * k / 4) for k in range(1, 4))],
        ),
    ],
)
@pytest.mark.parametrize("zero_stage", [0, 2])
def test_learning_rates(prompts, settings, expected, zero_stage):
    """Check reported rates, and what the first update did: AdamW's first step moves a weight by the learning rate."""
    engine = make_engine(zero_stage=zero_stage, lr=1e-3, weight_decay=0.0, **settings)
    batch = random_batch(prompts[2:3], [6])
    before = weights(engine)
    rates = [engine.update(batch, CrossEntropy()).lr]
    moved = max(float((value - before[name]).abs().max()) for name, value in weights(engine).items())
    assert moved == pytest.approx(1e-3 * expected[0], rel=1e-2)
    rates += [engine.update(batch, CrossEntropy()).lr for _ in range(3)]
    assert rates == pytest.approx([1e-3 * factor for factor in expected])


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("budget", [1, 70, 10_000])
def test_score(prompts, plain, temperature, budget):
    engine = make_engine(budget=budget, temperature=temperature)
    batch = random_batch(prompts, LENGTHS)
    scores = engine.score(batch)
    assert scores.dtype == torch.float32 and not scores.requires_grad
    torch.testing.assert_close(scores, plain_logp(plain, batch, temperature).float(), atol=1e-5, rtol=0)
    torch.testing.assert_close(engine.update(batch, PolicyGradient(EVERYTHING)).logp, scores, atol=1e-6, rtol=0)


def test_the_reference_stays_where_training_started(prompts, plain):
    engine = make_engine(lr=1e-2)
    reference = load_frozen_policy(model_dir(), torch.float32, torch.device("cpu"))
    batch = random_batch(prompts, LENGTHS)
    engine.update(batch, CrossEntropy())
    start = plain_logp(plain, batch).float()
    torch.testing.assert_close(engine.score(batch, reference), start, atol=1e-5, rtol=0)
    assert (engine.score(batch) - start).abs().max() > 1e-2
    assert not any(parameter.requires_grad for parameter in reference.parameters())


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_bfloat16_follows_float32(prompts, plain, zero_stage):
    batch = near_batch(prompts, LENGTHS, plain)
    exact, rounded = make_engine(lr=1e-3), make_engine(lr=1e-3, dtype="bfloat16", zero_stage=zero_stage)
    expected, found = exact.update(batch, PolicyGradient(EVERYTHING)), rounded.update(batch, PolicyGradient(EVERYTHING))
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=0.1)
    torch.testing.assert_close(found.logp, expected.logp, atol=0.2, rtol=0)
    moved = [engine.score(batch) - stats.logp for engine, stats in ((exact, expected), (rounded, found))]
    assert torch.nn.functional.cosine_similarity(moved[0].flatten(), moved[1].flatten(), dim=0) > 0.9


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_a_loaded_engine_goes_on_as_the_saved_one(prompts, tmp_path, zero_stage):
    def engine():
        return make_engine(zero_stage=zero_stage, schedule="cosine", warmup_updates=2)

    first, batch = engine(), random_batch(prompts, LENGTHS)
    first.update(batch, PolicyGradient(EVERYTHING))
    save_engine(first, tmp_path)
    expected = first.update(batch, PolicyGradient(EVERYTHING))

    second = engine()
    load_engine(second, tmp_path)
    found = second.update(batch, PolicyGradient(EVERYTHING))
    assert (found.lr, found.grad_norm, found.metrics) == (expected.lr, expected.grad_norm, expected.metrics)
    assert_same_weights(weights(second), weights(first), exact=True)


def test_bfloat16_without_zero_is_refused():
    with pytest.raises(UserError, match="train.zero_stage 0 with bfloat16.*set train.zero_stage=1"):
        make_engine(dtype="bfloat16", zero_stage=0)


def test_gradient_checkpointing_recomputes_and_changes_nothing(prompts, plain):
    batch = near_batch(prompts, LENGTHS, plain)
    results = []
    for checkpointing in (False, True):
        engine = make_engine(gradient_checkpointing=checkpointing, budget=10_000)
        calls = []
        layer = engine.policy.model.model.language_model.layers[0].mlp
        layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        engine.update(batch, PolicyGradient(EVERYTHING))
        results.append((len(calls), weights(engine)))
    (once, expected), (twice, found) = results
    assert (once, twice) == (1, 2)
    assert_same_weights(found, expected)


def test_masked_responses_are_no_part_of_the_loss(world, prompts):
    """The update equals one from the other responses alone."""
    batch = random_batch(prompts, [5, 9, 3, 7, 1, 12])
    masked = torch.tensor([False, True, False, False, True, True])
    some, others = make_engine(), make_engine()
    stats = some.update(replace(batch, loss_mask=batch.mask & ~masked[:, None]), PolicyGradient(EVERYTHING))
    kept = [row for row in range(6) if not masked[row]]
    names = ("tokens", "mask", "loss_mask", "logp", "advantage", "old_logp", "ref_logp")
    alone = UpdateBatch(tuple(prompts[row] for row in kept), *(getattr(batch, name)[kept] for name in names))
    expected = others.update(alone, PolicyGradient(EVERYTHING))
    assert stats.metrics == pytest.approx(expected.metrics, rel=1e-5)
    assert stats.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    torch.testing.assert_close(stats.logp[kept], expected.logp, atol=1e-5, rtol=0)
    assert_same_weights(weights(some), weights(others))


def test_a_batch_whose_responses_are_all_masked_changes_next_to_nothing(world, prompts):
    engine = make_engine(weight_decay=0.0)
    before = weights(engine)
    batch = random_batch(prompts, [5, 9, 3, 7, 1, 12])
    stats = engine.update(replace(batch, loss_mask=torch.zeros_like(batch.mask)), PolicyGradient(EVERYTHING))
    assert stats.grad_norm == 0 and all(value == 0 for value in stats.metrics.values())
    assert_same_weights(weights(engine), before, exact=True)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_the_optimizer_comes_back_from_the_host_as_it_went(world, prompts, zero_stage):
    stayed, moved = (make_engine(zero_stage=zero_stage) for _ in range(2))
    for step in range(3):
        batch = random_batch(prompts, [5, 9, 3, 7, 1, 12], seed=step)
        with moved.optimizer_offloaded():
            scores = moved.score(batch)
        torch.testing.assert_close(scores, stayed.score(batch), atol=0, rtol=0)
        assert (
            moved.update(batch, PolicyGradient(EVERYTHING)).grad_norm
            == stayed.update(batch, PolicyGradient(EVERYTHING)).grad_norm
        )
