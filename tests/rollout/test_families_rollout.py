"""Rollouts of every family: hf equals plain greedy generation; real vLLM equals the policy after every sync."""

import pytest
import torch
from family_helpers import (
    VISION,
    family_dir,
    family_distribution,
    family_plain,
    family_policy,
    family_prompts,
    never_sampled,
)
from policy_helpers import make_engine, plain_inputs, random_batch
from rollout_engines import ENDS, LIMIT, hf, vllm

from mssr.policy.families import FAMILIES
from mssr.policy.loss import CrossEntropy


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_hf_is_plain_greedy_generation(family):
    """All prompts in one padded batch; then only the text prompt, which must not get the images' position offset."""
    plain, prompts = family_plain(family_dir(family)), family_prompts(family)
    policy = family_policy(family)
    engine = hf(policy, ends=[0])
    engine.update_weights(policy, 0)
    batch = engine.generate(list(prompts), [0] * 6, 0.0)
    again = engine.generate([prompts[2]], [0], 0.0)
    assert again.response(0).tolist() == batch.response(2).tolist()
    for row, prompt in enumerate(prompts):
        inputs = plain_inputs(prompt, torch.tensor([], dtype=torch.int64), plain)
        own = plain.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=LIMIT,
            suppress_tokens=never_sampled(plain) or None,
            eos_token_id=0,
        )
        response = batch.response(row)
        assert response.tolist() == own[0, len(prompt.token_ids) :].tolist()
        expected = family_distribution(plain, prompt, response).gather(1, response[:, None]).squeeze(1)
        torch.testing.assert_close(batch.logp[row, : len(response)].double(), expected, atol=1e-5, rtol=0)


WITH_TOWER = pytest.mark.slow("12 to 15 s each; vLLM with a tower is in test_contract, with Qwen2.5-VL's")


@pytest.mark.parametrize(
    "family", [*(pytest.param(name, marks=WITH_TOWER) for name in ("qwen2_vl", "qwen3_vl")), "qwen3"]
)
def test_vllm_is_the_policy_after_every_sync(world, family):
    prompts = list(family_prompts(family))
    policy_engine = make_engine(path=family_dir(family), lr=1e-2)
    sampler = vllm(family_dir(family))
    plain = family_plain(family_dir(family)).requires_grad_(False)
    responses = []
    for version in (0, 1):
        plain.load_state_dict(policy_engine.policy.model.state_dict())
        sampler.update_weights(policy_engine.policy, version)
        batch = sampler.generate(prompts, [0] * 6, 0.0)
        torch.testing.assert_close(batch.logp, policy_engine.score(batch), atol=1e-4, rtol=0)
        for row, prompt in enumerate(prompts):
            response = batch.response(row)
            distribution = family_distribution(plain, prompt, response)
            assert response.tolist() == distribution.argmax(1).tolist()
            assert len(response) == LIMIT or int(response[-1]) in ENDS
        sampled = sampler.generate(prompts, [1, 2, 3, 4, 5, 6], 1.0)
        torch.testing.assert_close(sampled.logp, policy_engine.score(sampled), atol=1e-4, rtol=0)
        sampler.release()
        responses.append([batch.response(row).tolist() for row in range(6)])
        policy_engine.update(random_batch(prompts, [5, 9, 3, 7, 1, 12]), CrossEntropy())
    assert responses[0] != responses[1]
    assert (prompts[0].pixel_values is None) == (family not in VISION)
