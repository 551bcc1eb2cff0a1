"""The rollout engines as the tests make them, around the tiny model of `policy_helpers`."""

import os
from functools import cache

import torch
from policy_helpers import ALONE, model_dir, processors, run_config

from mssr.policy.loading import load_policy
from mssr.policy.model import Policy
from mssr.rollout.hf import HFRollout
from mssr.rollout.vllm import VLLMRollout

# Of 300 tokens: some responses of untrained weights end, others are cut.
ENDS = list(range(100, 130))
LIMIT = 12


def hf(policy: Policy, limit: int = LIMIT, ends=ENDS, batch_size: int = 64) -> HFRollout:
    config = run_config(max_response_tokens=limit, batch_size=batch_size)
    return HFRollout(policy, ends, processors()[0].pad_token_id, config.rollout, ALONE.device)


@cache
def vllm(path: str, limit: int = LIMIT, world=ALONE, **settings) -> VLLMRollout:
    """Started once for each kind: that takes seconds, and an engine forgets with every sync."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    config = run_config(path, engine="vllm", max_response_tokens=limit, **settings)
    return VLLMRollout(config, load_policy(path, torch.float32), ENDS, processors()[0].pad_token_id, world)


def engine_of(name: str, policy: Policy, limit: int = LIMIT):
    """The engine with the policy's weights, version 0."""
    engine = hf(policy, limit) if name == "hf" else vllm(model_dir(), limit)
    engine.update_weights(policy, 0)
    return engine
