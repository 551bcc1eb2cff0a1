"""The contract of every rollout engine (`RolloutEngine`): the same tests for both engines, with real vLLM."""

import random
from dataclasses import replace

import numpy
import pytest
import torch
from policy_helpers import make_engine, plain_distribution, plain_model, processors, random_batch
from rollout_engines import ENDS, LIMIT, cut, engine_of, say

from mssr.policy.loading import load_policy
from mssr.policy.loss import CrossEntropy
from mssr.rollout.base import noise_streams

STREAMS = noise_streams(0, "train", 0, list(range(24)))


@pytest.fixture(scope="module", params=["hf", "vllm"])
def name(request, world):
    return request.param


@pytest.fixture
def engine(name, policy):
    return engine_of(name, policy)


@pytest.fixture
def sampled(engine, prompts):
    """24 responses, four per prompt."""
    return engine.generate(list(prompts) * 4, STREAMS, 1.0)


def responses(batch):
    return [batch.response(row).tolist() for row in range(len(batch))]


def test_prompts_with_other_images_of_the_same_size_are_answered_as_theirs(engine, plain, prompts):
    """Two prompts that differ only in their image, in one greedy call."""
    first = prompts[1]
    second = replace(first, key="another", pixel_values=-first.pixel_values)
    batch = engine.generate([first, second], [0, 0], 0.0)
    own, others = (
        [plain_distribution(plain, prompt, batch.response(row)) for row, prompt in enumerate(order)]
        for order in ([first, second], [second, first])
    )
    for row in range(2):
        response = batch.response(row)
        assert response.tolist() == own[row].argmax(1).tolist()
        assert (own[row] - others[row]).gather(1, response[:, None]).abs().max() > 0.1  # the image matters
        torch.testing.assert_close(batch.logp[row, : len(response)].double(), own[row].amax(1), atol=1e-5, rtol=0)


def test_shapes_masks_and_padding(sampled, prompts):
    longest = int(sampled.mask.sum(1).max())
    assert sampled.prompts == tuple(prompts) * 4
    assert sampled.tokens.shape == sampled.mask.shape == sampled.logp.shape == (24, longest)
    assert (sampled.tokens.dtype, sampled.mask.dtype, sampled.logp.dtype) == (torch.int64, torch.bool, torch.float32)
    assert torch.equal(sampled.mask, torch.arange(longest) < sampled.lengths[:, None])
    assert (sampled.logp[~sampled.mask] == 0).all() and (sampled.logp[sampled.mask] < 0).all()
    assert (sampled.tokens[~sampled.mask] == processors()[0].pad_token_id).all()


def test_a_response_ends_at_its_first_end_token_or_is_truncated(sampled):
    for row, response in enumerate(responses(sampled)):
        assert not set(ENDS) & set(response[:-1])
        assert bool(sampled.truncated[row]) == (response[-1] not in ENDS)
        assert len(response) == LIMIT or not sampled.truncated[row]
    assert 0 < int(sampled.truncated.sum()) < 24


def test_an_end_token_on_the_last_position_is_no_truncation(engine, prompts):
    """Of 200 responses, some end exactly at the limit."""
    batch = engine.generate([prompts[2]] * 200, list(range(200)), 1.0)
    full = batch.lengths == LIMIT
    ended = torch.isin(batch.tokens[:, -1], torch.tensor(ENDS)) & full
    assert torch.equal(batch.truncated, full & ~ended)
    assert ended.any() and batch.truncated.any()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_log_probs_are_the_trainers(world, engine, plain, prompts, temperature):
    """They equal the trainer's scores, and plain transformers' without the tokens that are never sampled."""
    batch = engine.generate(list(prompts), list(range(6)), temperature)
    scored = make_engine(temperature=temperature).score(batch)
    torch.testing.assert_close(batch.logp[batch.mask], scored[batch.mask], atol=1e-5, rtol=0)
    for row, prompt in enumerate(prompts):
        response = batch.response(row)
        distribution = plain_distribution(plain, prompt, response, temperature)
        expected = distribution.gather(1, response[:, None]).squeeze(1)
        torch.testing.assert_close(batch.logp[row, : len(response)].double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "temperature, top_p, top_k", [(1.0, 0.8, None), (1.0, 1.0, 3), (0.5, 0.9, 20), (1.0, 0.99, 0), (1.0, 1e-6, 500)]
)
def test_log_probs_are_of_the_distribution_drawn_from(engine, plain, prompts, temperature, top_p, top_k):
    """Cut off by top_k, then top_p, after the temperature; the image pads have no share in it."""
    batch = engine.generate(list(prompts), list(range(6)), temperature, top_p=top_p, top_k=top_k)
    for row, prompt in enumerate(prompts):
        response = batch.response(row)
        distribution = cut(plain_distribution(plain, prompt, response, temperature), top_p, top_k)
        expected = distribution.gather(1, response[:, None]).squeeze(1)
        torch.testing.assert_close(batch.logp[row, : len(response)].double(), expected, atol=1e-5, rtol=0)


def test_greedy_ignores_what_cuts_off(engine, prompts):
    greedy = engine.generate(list(prompts), [0] * 6, 0.0)
    cut_off = engine.generate(list(prompts), [0] * 6, 0.0, top_p=0.1, top_k=2)
    assert responses(cut_off) == responses(greedy) and torch.equal(cut_off.logp, greedy.logp)


def test_greedy_is_the_most_probable_token(engine, plain, prompts):
    batch = engine.generate(list(prompts), [0] * 6, 0.0)
    for row, prompt in enumerate(prompts):
        response = batch.response(row)
        distribution = plain_distribution(plain, prompt, response)
        assert response.tolist() == distribution.argmax(1).tolist()
        torch.testing.assert_close(batch.logp[row, : len(response)].double(), distribution.amax(1), atol=1e-5, rtol=0)


SAID = "xß–oxed{!abcd"  # 12 tokens: "oxed{" is one, each byte of "ß" and of "–" too


@pytest.mark.parametrize(
    "stop, kept, truncated",
    [
        (["ß–"], 6, False),
        (["–ox"], 7, False),  # it ends in the middle of a token
        (["!", "{", "xb"], 7, False),
        (["cd"], 12, False),  # at the limit
        (["box"], 12, True),
        ([], 12, True),
    ],
)
def test_a_response_ends_with_a_stop_text(world, name, own_policy, prompts, monkeypatch, stop, kept, truncated):
    """The tokens up to it are kept as they were sampled, the one in which it ends whole; no end token follows."""
    tokenizer, _ = processors()
    said = tokenizer.encode(SAID)
    assert len(set(said)) == LIMIT
    say(own_policy, int(prompts[2].token_ids[-1]), said)
    engine = engine_of(name, own_policy, stop=stop)
    told, made, whole = [], [], engine._response
    monkeypatch.setattr(engine, "_response", lambda tokens, logp: made.append(len(tokens)) or whole(tokens, logp))
    batch = engine.generate(list(prompts[:3]), [0] * 3, 0.0, on_response=lambda row, found: told.append(found))
    assert responses(batch) == [said[:kept]] * 3 == [found.tokens.tolist() for found in told]
    assert batch.truncated.tolist() == [truncated] * 3
    assert made == [kept] * 3  # no tokens are generated for nothing


def test_end_tokens_and_stop_texts_whichever_comes_first(world, name, policy, prompts):
    tokenizer, _ = processors()
    stop = ["e", "1", "ß"]
    batch = engine_of(name, policy, stop=stop).generate(list(prompts) * 8, list(range(48)), 1.0)
    by_text = 0
    for row, response in enumerate(responses(batch)):
        before, whole = tokenizer.decode(response[:-1]), tokenizer.decode(response)
        assert not set(ENDS) & set(response[:-1]) and not any(text in before for text in stop)
        stopped = any(text in whole for text in stop)
        assert bool(batch.truncated[row]) == (response[-1] not in ENDS and not stopped)
        assert len(response) == LIMIT or not batch.truncated[row]
        by_text += stopped
    assert 0 < by_text < 48 - int(batch.truncated.sum())


def test_the_same_call_gives_the_same_responses(engine, prompts, sampled):
    engine.generate(list(prompts), [5] * 6, 1.0)  # a call in between has no influence
    again = engine.generate(list(prompts) * 4, STREAMS, 1.0)
    assert responses(again) == responses(sampled)
    assert torch.equal(again.logp, sampled.logp)


def test_other_streams_give_other_responses(engine, prompts, sampled):
    other = engine.generate(list(prompts) * 4, noise_streams(0, "train", 1, list(range(24))), 1.0)
    same = sum(mine == theirs for mine, theirs in zip(responses(other), responses(sampled)))
    assert same <= 2
    for first in range(6):  # responses to one prompt in a batch differ, too
        visits = {tuple(responses(sampled)[row]) for row in range(first, 24, 6)}
        assert len(visits) >= 3


@pytest.mark.parametrize("top_p, top_k", [(1.0, None), (0.9, 20)])
def test_samples_follow_the_distribution(engine, plain, prompts, top_p, top_k):
    """Chi-square test of the first tokens of 1,500 responses against their probabilities."""
    prompt, count = prompts[0], 1500
    streams = noise_streams(3, "train", 0, list(range(count)))
    batch = engine.generate([prompt] * count, streams, 1.0, top_p=top_p, top_k=top_k)
    whole = plain_distribution(plain, prompt, torch.zeros(1, dtype=torch.int64))
    probability = cut(whole, top_p, top_k)[0].exp()
    seen = torch.bincount(batch.tokens[:, 0], minlength=len(probability)).double()
    likely = probability * count >= 5
    expected = torch.cat([probability[likely], probability[~likely].sum()[None]]) * count
    found = torch.cat([seen[likely], seen[~likely].sum()[None]])
    assert seen[probability == 0].sum() == 0
    found, expected = found[expected > 0], expected[expected > 0]
    chi_square, freedom = float(((found - expected) ** 2 / expected).sum()), len(expected) - 1
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5


def test_the_trainers_random_state_is_its_own(engine, prompts):
    torch.manual_seed(11)
    before, python, arrays = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    engine.generate(list(prompts), list(range(6)), 1.0)
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python and numpy.random.get_state()[1].tolist() == arrays


def test_responses_are_told_as_they_complete(engine, prompts, sampled):
    told = {}
    engine.generate(
        list(prompts) * 4, STREAMS, 1.0, on_response=lambda row, found: told.setdefault(row, []).append(found)
    )
    assert sorted(told) == list(range(24))
    for row, found in told.items():
        assert len(found) == 1
        assert found[0].tokens.tolist() == responses(sampled)[row]
        assert found[0].truncated == bool(sampled.truncated[row])


def test_the_order_of_work_is_not_the_order_of_the_batch(engine, prompts):
    expected = [float(row) for row in range(24)]
    batch = engine.generate(list(prompts) * 4, STREAMS, 0.0, expected_tokens=expected)
    assert batch.prompts == tuple(prompts) * 4
    assert responses(batch) == responses(engine.generate(list(prompts) * 4, STREAMS, 0.0))


def test_the_longest_response_is_begun_first(world, policy, prompts, monkeypatch):
    engine = engine_of("vllm", policy)
    begun, add = [], engine._llm.llm_engine.add_request

    def noting(request_id, prompt, params):
        begun.append(prompt["prompt_token_ids"])
        return add(request_id, prompt, params)

    monkeypatch.setattr(engine._llm.llm_engine, "add_request", noting)
    engine.generate(list(prompts), list(range(6)), 0.0, expected_tokens=[3.0, 9.0, 1.0, 8.0, 2.0, 7.0])
    assert begun == [prompts[row].token_ids.tolist() for row in (1, 3, 5, 0, 4, 2)]


@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_image_and_video_pads_are_never_sampled(world, name, prompts, top_p):
    """Even if the weights give them the largest logits. top_p is a share of the rest."""
    policy_engine = make_engine()
    model = policy_engine.policy.model
    pads = [model.config.image_token_id, model.config.video_token_id]
    with torch.no_grad():
        model.lm_head.weight[pads] = 20 * model.lm_head.weight.abs().max() * model.lm_head.weight[ENDS[:2]].sign()
    batch = engine_of(name, policy_engine.policy).generate(list(prompts) * 4, STREAMS, 1.0, top_p=top_p)
    assert not torch.isin(batch.tokens, torch.tensor(pads)).any()
    kept = (policy_engine.score(batch) - batch.logp)[batch.mask].exp()
    assert top_p - 1e-5 <= kept.min() and kept.max() <= min(top_p + 0.02, 1 + 1e-5)  # all are about equally probable


def test_weights_as_they_are_now(world, name, prompts):
    """Samples are from the current weights after each update, also for images seen before."""
    policy_engine = make_engine(lr=1e-2)
    engine = engine_of(name, policy_engine.policy)
    before = engine.generate(list(prompts), list(range(6)), 1.0)
    for version in (1, 2):
        policy_engine.update(random_batch(prompts, [5, 9, 3, 7, 1, 12]), CrossEntropy())
        engine.release()
        engine.update_weights(policy_engine.policy, version)
        after = engine.generate(list(prompts), list(range(6)), 1.0)
        assert after.weight_version.tolist() == [version] * 6
        torch.testing.assert_close(after.logp, policy_engine.score(after), atol=1e-4, rtol=0)
        moved = (policy_engine.score(before) - before.logp).abs()[before.mask].max()
        assert moved > 0.1  # else the comparison above proves nothing
    fresh = plain_model(policy_engine.policy.model.config._name_or_path).requires_grad_(False)
    fresh.load_state_dict(policy_engine.policy.model.state_dict())
    response = after.response(0)
    expected = plain_distribution(fresh, prompts[0], response).gather(1, response[:, None]).squeeze(1)
    torch.testing.assert_close(after.logp[0, : len(response)].double(), expected, atol=1e-4, rtol=0)


def test_an_engine_without_weights_refuses(name, model_dir):
    if name == "hf":
        from rollout_engines import hf

        engine = hf(load_policy(model_dir, torch.float32))
    else:
        engine = engine_of(name, load_policy(model_dir, torch.float32))
        engine.release()
    with pytest.raises(RuntimeError, match="update_weights"):
        engine.generate([], [], 1.0)


def test_nothing_asked_is_an_empty_batch(engine):
    """A rank without problems left still makes the call."""
    batch = engine.generate([], [], 1.0)
    assert len(batch) == 0 and batch.tokens.shape == (0, 0) and batch.truncated.dtype == torch.bool
