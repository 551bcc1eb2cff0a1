"""The KL term's reference: the initial policy, wherever its weights are kept, or the current policy with blank images."""

from dataclasses import replace

import pytest
import torch
from option_helpers import LORA, disturb, make_engine_with, options
from policy_helpers import assert_same_weights, model_dir, plain_logp, random_batch, whole_weights

from mssr.config.algorithm_keys import AlgorithmConfig
from mssr.policy.loss import CrossEntropy
from mssr.policy.reference import frozen_start, make_reference

PLACEMENTS = ["copy", "sharded", "cpu"]


def settings(placement: str, tied: bool = False):
    """Return the section `model`. With LoRA the base model is the reference and needs no placement."""
    lora = {"lora": LORA} if placement == "lora" else {"reference": placement}
    return options(model_dir(tied), **lora)


def score_while_training(world, batches, zero_stage, **kind):
    """Return (the reference's, the policy's own log-probs) of this rank's rows after each of two updates."""
    engine = make_engine_with(settings(**kind), zero_stage=zero_stage, world=world)
    reference, batch, found = frozen_start(settings(**kind), engine), batches[world.rank], []
    for _ in range(2):
        engine.update(batch, CrossEntropy())
        found.append((reference.score(engine, batch), engine.score(batch)))
    return found


@pytest.mark.parametrize("zero_stage, placements", [(2, [*PLACEMENTS, "lora"]), (3, ["copy", "sharded", "lora"])])
def test_every_placement_scores_with_the_start(ranks, prompts, plain, zero_stage, placements):
    """Rank 1 has one short row of text: fewer micro-batches, and nothing for the vision tower."""
    batches = [random_batch(prompts, [5, 9, 3, 7, 1, 12]), random_batch(prompts[2:3], [2])]
    expected = [plain_logp(plain, batch).float() for batch in batches]
    scores = {}
    for placement in placements:
        found = ranks(score_while_training, batches, zero_stage, placement=placement)
        for rank, passes in enumerate(found):
            for reference, policy in passes:
                torch.testing.assert_close(reference, expected[rank], atol=1e-5, rtol=0)
                assert (policy - reference)[batches[rank].mask].abs().max() > 1e-2
        scores[placement] = [reference for passes in found for reference, _ in passes]
    for placement, found in scores.items():
        for mine, copy in zip(found, scores["copy"]):
            torch.testing.assert_close(mine, copy, atol=1e-6, rtol=0, msg=placement)


@pytest.mark.parametrize("placement", [*PLACEMENTS, "lora"])
def test_one_rank_and_a_tied_head(world, prompts, placement):
    batch = random_batch(prompts, [5, 9, 3, 7, 1, 12])
    start = make_engine_with(settings("copy", tied=True)).score(batch)
    for reference, _ in score_while_training(world, [batch], 0, placement=placement, tied=True):
        torch.testing.assert_close(reference, start, atol=1e-6, rtol=0)


def train(world, batches, zero_stage, placement, scored):
    engine = make_engine_with(settings(placement), zero_stage=zero_stage, world=world)
    reference = frozen_start(settings(placement), engine)
    for _ in range(3):
        engine.update(batches[world.rank], CrossEntropy())
        if scored:
            reference.score(engine, batches[world.rank])
    return whole_weights(engine)


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_scoring_leaves_the_training_as_it_was(ranks, prompts, zero_stage):
    """Adapters that were disabled for scoring must still train: ZeRO's hooks are on their parameters."""
    batches = [random_batch(prompts, [5, 9, 3, 7, 1, 12]), random_batch(prompts[2:3], [2])]
    without, with_scores = (ranks(train, batches, zero_stage, "lora", scored) for scored in (False, True))
    for mine, theirs in zip(with_scores, without):
        assert_same_weights(mine, theirs, exact=True)


def test_the_host_keeps_the_weights_after_a_pass_that_failed(world, prompts):
    engine = make_engine_with(settings("cpu"))
    reference, batch = frozen_start(settings("cpu"), engine), random_batch(prompts, [5, 9, 3, 7, 1, 12])
    first = reference.score(engine, batch)
    forbidden = random_batch(prompts, [5, 9, 3, 7, 1, 12])
    forbidden.tokens[0, 0] = engine.policy.image_token_id
    with pytest.raises(ValueError, match="image or video pad"):
        reference.score(engine, forbidden)
    assert torch.equal(reference.score(engine, batch), first)


TEXT_ONLY = AlgorithmConfig(kl_coef=0.1, kl_to="text_only")


def test_text_only_is_the_policy_of_now_before_blank_images(world, prompts):
    """Oracle: plain transformers with the engine's weights and zeros for pixels."""
    batch = random_batch(prompts, [5, 9, 3, 7, 1, 12])
    engine = make_engine_with(settings("copy"))
    reference = make_reference(TEXT_ONLY, settings("copy"), engine)
    start = reference.score(engine, batch)
    engine.update(batch, CrossEntropy())
    now = reference.score(engine, batch)
    assert (now - start)[batch.mask].abs().max() > 1e-2

    pictured = torch.tensor([prompt.pixel_values is not None for prompt in batch.prompts])
    seen = engine.score(batch)
    assert torch.equal(now[~pictured], seen[~pictured])
    assert ((now - seen).abs().sum(1)[pictured] > 1e-3).all()
    blank = replace(batch, prompts=tuple(without_colour(prompt) for prompt in batch.prompts))
    torch.testing.assert_close(now, plain_logp(engine.policy.model, blank).float(), atol=1e-5, rtol=0)
    assert all(prompt.pixel_values is None or prompt.pixel_values.any() for prompt in batch.prompts)  # unchanged


def without_colour(prompt):
    return prompt if prompt.pixel_values is None else replace(prompt, pixel_values=prompt.pixel_values * 0)


def test_text_only_with_adapters_is_the_policy_of_now_too(world, prompts):
    batch, engine = random_batch(prompts, [5, 9, 3, 7, 1, 12]), make_engine_with(settings("lora"))
    disturb(engine.policy)
    now = make_reference(TEXT_ONLY, settings("lora"), engine).score(engine, batch)
    blank = replace(batch, prompts=tuple(without_colour(prompt) for prompt in batch.prompts))
    assert torch.equal(now, engine.score(blank))
    assert (now - frozen_start(settings("lora"), engine).score(engine, blank))[batch.mask].abs().max() > 1e-2


def test_no_kl_term_needs_no_reference(world):
    assert make_reference(AlgorithmConfig(kl_coef=0.0), settings("copy"), make_engine_with(settings("copy"))) is None
