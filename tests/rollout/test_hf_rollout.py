"""Guarantees of the hf engine beyond the contract: a response depends only on its noise stream and the weights."""

import shutil
from dataclasses import replace

import pytest
import torch
from policy_helpers import (
    ALONE,
    edit_json,
    make_engine,
    plain_distribution,
    plain_inputs,
    plain_model,
    processors,
    random_batch,
)

from mssr.config.schema import RolloutConfig
from mssr.policy.loading import load_policy
from mssr.policy.loss import CrossEntropy
from mssr.rollout.base import noise_streams
from mssr.rollout.hf import HFRollout, end_token_ids

EXTRA_ENDS = list(range(100, 130))  # 30 of 300 tokens, so that some responses end and others are truncated


def rollout(policy, *, max_response_tokens=12, batch_size=64, ends=EXTRA_ENDS):
    """Return a sampler of the policy, with many end tokens, so that untrained weights finish some responses."""
    tokenizer, _ = processors()
    own = policy.model.generation_config.eos_token_id
    policy.model.generation_config.eos_token_id = [tokenizer.eos_token_id, *ends]
    try:
        all_ends = end_token_ids(policy, tokenizer)
    finally:
        policy.model.generation_config.eos_token_id = own
    config = RolloutConfig(max_response_tokens=max_response_tokens, batch_size=batch_size)
    engine = HFRollout(config, policy, all_ends, tokenizer.pad_token_id, ALONE.device)
    engine.update_weights(policy, 0)
    return engine


@pytest.mark.parametrize("own, ends", [([5, 7], [5, 7]), (9, [9]), (None, [])])
def test_a_response_ends_at_any_end_token_of_the_model_or_of_the_tokenizer(policy, monkeypatch, own, ends):
    tokenizer, _ = processors()
    monkeypatch.setattr(policy.model.generation_config, "eos_token_id", own)
    assert end_token_ids(policy, tokenizer) == sorted({*ends, tokenizer.eos_token_id})


def pads(model) -> list[int]:
    return [model.config.image_token_id, model.config.video_token_id]


def assert_same_responses(found, expected):
    """Compare responses. Padded lengths may differ, and neighbours may change the rounding of log-probs."""
    assert len(found) == len(expected)
    for row in range(len(expected)):
        assert found.response(row).tolist() == expected.response(row).tolist()
        length = len(expected.response(row))
        torch.testing.assert_close(found.logp[row, :length], expected.logp[row, :length], atol=1e-5, rtol=0)


def select(batch, order):
    parts = {name: getattr(batch, name)[order] for name in ("tokens", "mask", "logp", "truncated")}
    return replace(batch, prompts=tuple(batch.prompts[row] for row in order), **parts)


@pytest.fixture(scope="module")
def sampled(policy, prompts):
    """24 responses, four per prompt."""
    chosen = list(prompts) * 4
    return rollout(policy).generate(chosen, noise_streams(0, "train", 0, list(range(24))), 1.0)


@pytest.mark.parametrize("batch_size", [1, 5, 7])
def test_the_same_streams_give_the_same_responses_in_any_batches(policy, prompts, sampled, batch_size):
    streams = noise_streams(0, "train", 0, list(range(24)))
    assert_same_responses(rollout(policy, batch_size=batch_size).generate(list(prompts) * 4, streams, 1.0), sampled)


def test_order_and_neighbours_do_not_matter(policy, prompts, sampled):
    streams = noise_streams(0, "train", 0, list(range(24)))
    for chosen in ([17, 3, 8, 0, 21, 2], [8], [2, 14], list(reversed(range(24)))):
        asked = [prompts[slot % 6] for slot in chosen]
        found = rollout(policy).generate(asked, [streams[slot] for slot in chosen], 1.0)
        assert_same_responses(found, select(sampled, chosen))


def test_a_longer_limit_only_continues(policy, prompts, sampled):
    streams = noise_streams(0, "train", 0, list(range(6)))
    short = rollout(policy, max_response_tokens=5).generate(list(prompts), streams, 1.0)
    for row in range(6):
        assert short.response(row).tolist() == sampled.response(row).tolist()[:5]


def chi_square_bound(bins: int) -> float:
    """Return a bound far above what the statistic reaches by chance (more than 4 standard deviations)."""
    return bins + 4 * (2 * bins) ** 0.5 + 8


def test_whole_responses_follow_the_policy(policy, plain, prompts):
    """Each token's cumulative probability given its past is uniform, and uncorrelated with that of the token before."""
    prompt, count, length = prompts[0], 96, 8
    streams = noise_streams(5, "train", 0, list(range(count)))
    batch = rollout(policy, max_response_tokens=length, ends=[]).generate([prompt] * count, streams, 1.0)
    jitter, within, pairs = torch.Generator().manual_seed(0), [], []
    for row in range(count):
        response = batch.response(row)
        dist = plain_distribution(plain, prompt, response).exp()
        mass = dist.gather(1, response[:, None]).squeeze(1)
        below = dist.cumsum(1).gather(1, response[:, None]).squeeze(1) - mass
        uniform = below + mass * torch.rand(len(response), generator=jitter)
        within.append(uniform)
        pairs.append(torch.stack([uniform[:-1], uniform[1:]]))
    values, (before, after) = torch.cat(within), torch.cat(pairs, dim=1)
    expected = len(values) / 10
    assert float(((torch.histc(values, 10, 0, 1) - expected) ** 2 / expected).sum()) < chi_square_bound(10)
    correlation = torch.corrcoef(torch.stack([before, after]))[0, 1]
    assert abs(float(correlation)) < 4 / len(before) ** 0.5


def test_temperature_zero_is_transformers_greedy(policy, plain, prompts):
    engine = rollout(policy, ends=[])
    batch = engine.generate(list(prompts), [0] * 6, 0.0)
    for row, prompt in enumerate(prompts):
        inputs = plain_inputs(prompt, torch.tensor([], dtype=torch.int64), plain)
        own = plain.generate(**inputs, do_sample=False, max_new_tokens=12, suppress_tokens=pads(plain))
        response = batch.response(row)
        assert response.tolist() == own[0, len(prompt.token_ids) :].tolist()[: len(response)]
        dist = plain_distribution(plain, prompt, response)
        expected = dist.gather(1, response[:, None]).squeeze(1)
        torch.testing.assert_close(batch.logp[row, : len(response)].double(), expected, atol=1e-5, rtol=0)


def test_a_models_own_sampling_settings_change_nothing(model_dir, prompts, sampled, tmp_path):
    """Qwen2.5-VL ships a repetition penalty and a temperature; samples under them would be off-policy."""
    folder = shutil.copytree(model_dir, tmp_path / "model")
    settings = {"do_sample": True, "temperature": 0.1, "repetition_penalty": 1.5, "top_k": 3, "top_p": 0.3}
    settings |= {"no_repeat_ngram_size": 2, "suppress_tokens": list(range(20, 90))}
    edit_json(folder / "generation_config.json", **settings)
    policy = load_policy(str(folder), torch.float32)
    streams = noise_streams(0, "train", 0, list(range(24)))
    assert_same_responses(rollout(policy).generate(list(prompts) * 4, streams, 1.0), sampled)
    greedy = rollout(policy, ends=[]).generate(list(prompts), [0] * 6, 0.0)
    plain = rollout(load_policy(model_dir, torch.float32), ends=[]).generate(list(prompts), [0] * 6, 0.0)
    assert_same_responses(greedy, plain)
    assert policy.model.generation_config.repetition_penalty == 1.5  # unchanged, and saved with the model


def test_text_only_prompts_after_pictures(model_dir, prompts):
    """The model keeps the position offset of the last images, which must not be used for text."""
    expected = rollout(load_policy(model_dir, torch.float32)).generate([prompts[2]] * 2, [1, 2], 1.0)
    policy = load_policy(model_dir, torch.float32)
    rollout(policy).generate([prompts[3], prompts[4]], [3, 4], 1.0)
    assert_same_responses(rollout(policy).generate([prompts[2]] * 2, [1, 2], 1.0), expected)


def test_weights_as_they_are_now(world, model_dir, prompts):
    """Sampling between updates also works with gradient checkpointing, which turns off the cache for generation."""
    engine = make_engine(lr=1e-2, gradient_checkpointing=True)
    sampler = rollout(engine.policy)
    before = sampler.generate(list(prompts), list(range(6)), 1.0)
    torch.testing.assert_close(engine.score(before)[before.mask], before.logp[before.mask], atol=0.2, rtol=0)
    engine.update(random_batch(prompts, [5, 9, 3, 7, 1, 12]), CrossEntropy())
    sampler.update_weights(engine.policy, 1)
    after = sampler.generate(list(prompts), list(range(6)), 1.0)
    assert any(before.response(row).tolist() != after.response(row).tolist() for row in range(6))
    fresh = plain_model(model_dir).requires_grad_(False)
    fresh.load_state_dict(engine.policy.model.state_dict())
    for row, prompt in enumerate(prompts):
        dist = plain_distribution(fresh, prompt, after.response(row))
        expected = dist.gather(1, after.response(row)[:, None]).squeeze(1)
        length = len(expected)
        torch.testing.assert_close(after.logp[row, :length].double(), expected, atol=2e-5, rtol=0)


def test_noise_streams_are_distinct():
    streams = [
        stream
        for seed in (0, 1, 11)
        for purpose in ("train", "init", "eval")
        for step in (0, 1, 11, 111)
        for stream in noise_streams(seed, purpose, step, list(range(120)))
    ]
    assert len(set(streams)) == len(streams) == 3 * 3 * 4 * 120
    assert all(0 <= stream < 2**64 for stream in streams)


def test_a_slots_stream_does_not_depend_on_who_else_is_asked_for():
    whole = noise_streams(7, "train", 3, list(range(32)))
    assert whole == noise_streams(7, "train", 3, list(range(32)))
    assert noise_streams(7, "train", 3, [5, 30, 2]) == [whole[5], whole[30], whole[2]]


def sample_own(world, path, prompts, streams):
    engine = rollout(load_policy(path, torch.float32))
    own = slice(world.rank, None, world.size)
    return engine.generate(prompts[own], streams[own], 1.0)


def test_ranks_sample_what_one_would(ranks, model_dir, prompts, sampled):
    streams = noise_streams(0, "train", 0, list(range(24)))
    for rank, found in enumerate(ranks(sample_own, model_dir, list(prompts) * 4, streams)):
        assert_same_responses(found, select(sampled, list(range(rank, 24, 2))))
