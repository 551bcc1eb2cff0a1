"""ZeRO-3: two ranks with sharded parameters match one rank with unsharded ones.

`test_engine_ranks` tests what all stages have in common; this file tests what only sharding can break.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from policy_helpers import (
    EagerTrainer,
    assert_same_weights,
    make_engine,
    model_dir,
    near_batch,
    plain_logp,
    plain_model,
    processors,
    random_batch,
    whole_weights,
)
from safetensors.torch import load_file
from test_engine_ranks import CONFIG, global_batches, train

from mssr.algorithms.value_tracker import ValueTracker
from mssr.batch import Sequences
from mssr.config.algorithm_keys import TrackerConfig
from mssr.config.schema import RolloutConfig, TrainConfig
from mssr.errors import UserError
from mssr.policy.export import save_model
from mssr.policy.loading import load_frozen_policy
from mssr.policy.loss import CrossEntropy, PolicyGradient
from mssr.rollout.base import noise_streams
from mssr.rollout.hf import HFRollout, end_token_ids
from mssr.stopwatch import Stopwatch
from mssr.training.checkpoint import Checkpoints
from mssr.training.tracking import drift_of_previous_responses, previous_responses

SHARES = {"zero_stage": 3, "budget": 100}


def in_shares(policy) -> bool:
    """Return whether all parameters of at least 4096 numbers (not vectors, two small matrices per layer) are sharded."""
    large = [parameter for parameter in policy.parameters() if parameter.ds_numel >= 4096]
    return len(large) > 20 and all(one.numel() == 0 and one.ds_tensor.numel() < one.ds_numel for one in large)


def train_and_look(world, batches, **settings):
    engine = make_engine(world=world, **settings)
    looks, stats, scores = [in_shares(engine.policy)], [], []
    for batch in batches:
        half = len(batch) // 2
        own = batch.rows(world.rank * half, (world.rank + 1) * half)
        scores.append(engine.score(own))
        looks.append(in_shares(engine.policy))
        stats.append(engine.update(own, PolicyGradient(CONFIG)))
        looks.append(in_shares(engine.policy))
    return whole_weights(engine), stats, scores, looks


@pytest.mark.parametrize(
    ("tied", "grad_clip", "gradient_checkpointing"),
    [(False, 1000.0, True), (False, 0.05, False), (True, 1000.0, False), (True, 0.05, True)],
)
def test_updates_equal_the_written_out_ones(ranks, prompts, plain, tied, grad_clip, gradient_checkpointing):
    path, batches = model_dir(tied), global_batches(prompts, plain)
    settings = {"path": path, "grad_clip": grad_clip, "weight_decay": 1.0}
    eager, norms, logps = EagerTrainer(**settings), [], []
    for batch in batches:
        with torch.no_grad():
            logps.append(plain_logp(eager.model, batch).float())
        norms.append(eager.update(batch, CONFIG))
    found = ranks(train_and_look, batches, gradient_checkpointing=gradient_checkpointing, **SHARES, **settings)
    for weights, stats, _, looks in found:
        assert all(looks)
        assert [step.grad_norm for step in stats] == pytest.approx(norms, rel=1e-3)
        assert_same_weights(weights, eager.weights())
    for step, logp in enumerate(logps):
        scores = torch.cat([rank[2][step] for rank in found])
        torch.testing.assert_close(scores, logp, atol=5e-5, rtol=0)
        torch.testing.assert_close(torch.cat([rank[1][step].logp for rank in found]), scores, atol=1e-6, rtol=0)


def test_one_rank_holds_the_only_share(world, prompts, plain):
    batch = near_batch(prompts, [5, 9, 3, 7, 1, 12], plain)
    eager, engine = EagerTrainer(model_dir(), grad_clip=1.0), make_engine(**SHARES)
    assert engine.update(batch, PolicyGradient(CONFIG)).grad_norm == pytest.approx(
        eager.update(batch, CONFIG), rel=1e-3
    )
    assert_same_weights(whole_weights(engine), eager.weights())


def test_bfloat16_follows_one_rank_that_has_it_whole(ranks, world, prompts, plain):
    batches = global_batches(prompts, plain)[:2]
    settings = {"path": model_dir(), "dtype": "bfloat16", "lr": 1e-3}
    weights, expected = train(world, batches, zero_stage=2, **settings)
    for found, stats, _, _ in ranks(train_and_look, batches, **SHARES, **settings):
        assert {weight.dtype for weight in found.values()} == {torch.bfloat16}
        for mine, theirs in zip(stats, expected):
            assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=0.02)
            assert mine.metrics["entropy"] == pytest.approx(theirs.metrics["entropy"], rel=0.01)
        for name, weight in weights.items():
            difference = (found[name].float() - weight.float()).abs()
            assert difference.mean() < 2e-4, name  # two updates of 1e-3


def score_unevenly(world, batches):
    """Rank 1 has fewer micro-batches, no image, then an empty batch. Only rank 0 scores with the reference."""
    engine = make_engine(world=world, **SHARES | {"budget": 1})
    scores = [engine.score(batches[world.rank])]
    if world.rank == 0:
        scores.append(engine.score(batches[0]))
    else:
        engine.score(Sequences.of([], []))
    reference = load_frozen_policy(model_dir(), torch.float32, world.device)
    if world.rank == 0:
        scores.append(engine.score(batches[0], reference))
    return scores


def test_ranks_score_what_they_have(ranks, prompts, plain):
    batches = [random_batch(prompts, [5, 9, 3, 7, 1, 12]), random_batch(prompts[2:3], [2])]
    for scores, batch in zip(ranks(score_unevenly, batches), batches):
        for found in scores:
            torch.testing.assert_close(found, plain_logp(plain, batch).float(), atol=1e-5, rtol=0)


def drift_of_few(world, batch):
    """The tracker knows previous responses only for rank 0's prompts."""
    engine = make_engine(world=world, **SHARES)
    tracker = ValueTracker(TrackerConfig(drift="prompt"))
    known = batch.rows(0, 3)
    tracker.initialise(known.keys, torch.zeros(3))
    tracker.remember(known.keys, previous_responses(known, known.logp))
    return drift_of_previous_responses(tracker, engine, batch.prompts[3 * world.rank :][:3], Stopwatch(world.device))


def test_drift_where_one_rank_has_no_previous_response(ranks, prompts, plain):
    batch = near_batch(prompts, [5, 9, 3, 7, 1, 12], plain)
    first, second = ranks(drift_of_few, batch)
    gap = (plain_logp(plain, batch).float() - batch.logp).abs()
    torch.testing.assert_close(first, (gap.sum(1) / batch.lengths)[:3], atol=1e-5, rtol=0)
    assert second.tolist() == [0, 0, 0]


def test_drift_of_the_second_of_three_alone(world, prompts, plain):
    batch = near_batch(prompts[:3], [5, 9, 3], plain)
    tracker, known = ValueTracker(TrackerConfig(drift="prompt")), batch.rows(1, 2)
    tracker.initialise(known.keys, torch.zeros(1))
    tracker.remember(known.keys, previous_responses(known, known.logp))
    drift = drift_of_previous_responses(tracker, make_engine(world=world), batch.prompts, Stopwatch(world.device))
    first, second, third = drift.tolist()
    gap = (plain_logp(plain, known).float() - known.logp).abs().sum() / 9
    assert (first, third) == (0, 0) and second == pytest.approx(float(gap), abs=1e-5)


def sample_and_move(world, prompts, streams, **settings):
    """Sample before and after an update; ranks differ in prompts, calls and tokens. Return batches and log-prob gaps."""
    engine = make_engine(world=world, lr=1e-2, **settings)
    config = RolloutConfig(max_response_tokens=[12, 7][world.rank], batch_size=4)
    tokenizer, _ = processors()
    ends = end_token_ids(engine.policy, tokenizer)
    rollout = HFRollout(config, engine.policy, ends, tokenizer.pad_token_id, world.device)
    rollout.update_weights(engine.policy, 0)
    own = [slice(0, 5), slice(5, 6)][world.rank]
    before = [rollout.generate(prompts[own], streams[own], 1.0)]
    if world.rank == 0:
        before.append(rollout.generate(prompts[own], streams[own], 1.0))
    gaps = [engine.score(before[0]) - before[0].logp]
    engine.update(random_batch(prompts[own], [4] * len(prompts[own])), CrossEntropy())
    rollout.update_weights(engine.policy, 1)
    after = rollout.generate(prompts[own], streams[own], 1.0)
    gaps.append(engine.score(after) - after.logp)
    rollout.release()
    rollout.update_weights(engine.policy, 1)
    assert torch.equal(rollout.generate(prompts[own], streams[own], 1.0).tokens, after.tokens)
    return [*before, after], [float(gap.abs().max()) for gap in gaps]


@pytest.mark.parametrize("tied", [False, True])
def test_rollouts_are_from_the_weights_as_they_are(ranks, world, prompts, tied):
    streams = noise_streams(0, "train", 0, list(range(6)))
    (first, again, _), _ = sample_and_move(world, prompts, streams, path=model_dir(tied))
    found = ranks(sample_and_move, prompts, streams, path=model_dir(tied), **SHARES)
    for _, gaps in found:
        assert max(gaps) < 1e-4
    whole = found[0][0][0]
    assert torch.equal(whole.tokens, first.tokens) and torch.equal(whole.tokens, again.tokens)
    assert not torch.equal(found[0][0][2].tokens[:, :3], whole.tokens[:, :3])


def checkpoint_and_export(world, batches, folder):
    """Make two updates, save after the first, resume there in a new engine, and export its model."""
    share = [batch.rows(world.rank * len(batch) // 2, (world.rank + 1) * len(batch) // 2) for batch in batches]
    first = make_engine(world=world, path=model_dir(True), **SHARES)
    first.update(share[0], PolicyGradient(CONFIG))
    checkpoints = Checkpoints(folder / "run", world, TrainConfig(async_save=False))
    checkpoints.save(1, first, {"note": "kept"})
    saved = checkpoints.newest_state(resume=True)
    assert saved["note"] == "kept"
    second = make_engine(world=world, path=model_dir(True), schedule="constant", **SHARES)
    checkpoints.load_engine(saved, second)
    first.update(share[1], PolicyGradient(CONFIG))
    second.update(share[1], PolicyGradient(CONFIG))
    save_model(second.policy, processors(), folder / "model", world)
    return whole_weights(first), whole_weights(second), in_shares(second.policy)


def test_a_checkpoint_goes_on_exactly_and_exports_whole(ranks, prompts, plain, tmp_path):
    for uninterrupted, resumed, shared in ranks(checkpoint_and_export, global_batches(prompts, plain)[:2], tmp_path):
        assert_same_weights(resumed, uninterrupted, exact=True)
        assert shared
    saved = plain_model(tmp_path / "model").state_dict()
    assert_same_weights(saved, resumed, exact=True)
    folders = (tmp_path / "model", Path(model_dir(True)))
    names, original_names = (load_file(folder / "model.safetensors").keys() for folder in folders)
    assert names == original_names
    config, original_config = (json.loads((folder / "config.json").read_text()) for folder in folders)
    assert config == original_config
    assert {path.name for path in tmp_path.iterdir()} == {"run", "model"}


def refused(world, path) -> str:
    try:
        make_engine(world=world, path=path, zero_stage=3)
    except UserError as error:
        return str(error)
    return "loaded"


def test_weights_that_are_not_whole_are_refused_on_every_rank(ranks, tmp_path):
    folder = shutil.copytree(model_dir(), tmp_path / "model")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    lines = ranks(refused, str(folder))
    assert lines[0] == lines[1] and lines[0].startswith(f"model.path {folder}: ") and "\n" not in lines[0]


def test_a_response_with_an_image_pad_is_refused(world, prompts, policy):
    """Its log-prob is -inf: training on it would make the weights NaN."""
    batch = random_batch(prompts[:2], [4, 4])
    tokens = batch.tokens.clone()
    tokens[1, 2] = policy.image_token_id
    with pytest.raises(ValueError, match="row 1 holds an image or video pad"):
        make_engine().update(replace(batch, tokens=tokens), CrossEntropy())
