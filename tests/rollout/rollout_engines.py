"""Rollout engines for tests, with the tiny model of `policy_helpers`."""

from functools import cache

import torch
import torch.nn.functional as F
from policy_helpers import ALONE, model_dir, processors, run_config

from mssr.policy.loading import load_policy
from mssr.policy.model import Policy
from mssr.rollout.hf import HFRollout
from mssr.rollout.stop import StopTexts
from mssr.rollout.vllm.adapter import require_vllm
from mssr.rollout.vllm.engine import VLLMRollout

# 30 of 300 tokens, so that some responses of untrained weights end and others are truncated.
ENDS = list(range(100, 130))
LIMIT = 12


def hf(policy: Policy, limit: int = LIMIT, ends=ENDS, batch_size: int = 64) -> HFRollout:
    config = run_config(max_response_tokens=limit, batch_size=batch_size)
    return HFRollout(config.rollout, policy, ends, processors()[0].pad_token_id, ALONE.device)


@cache
def small_cache() -> None:
    """Limit the KV cache to 128 MiB: vLLM's own setting is in whole GiB, and engines live until the session ends."""
    from vllm.platforms.cpu import CpuPlatform

    whole = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls, config):
        whole(cls, config)
        config.cache_config.kv_cache_memory_bytes = 128 * 2**20

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


@cache
def vllm(path: str, limit: int = LIMIT, world=ALONE, **settings) -> VLLMRollout:
    """Return vLLM's engine, started once per combination of arguments; a sync clears what earlier tests left in it."""
    require_vllm("cpu")  # before vLLM is imported
    small_cache()
    config = run_config(path, engine="vllm", max_response_tokens=limit, **settings)
    return VLLMRollout(config, load_policy(path, torch.float32), ENDS, processors()[0].pad_token_id, world)


def engine_of(name: str, policy: Policy, limit: int = LIMIT, stop=()):
    """Return the engine with the policy's weights, version 0."""
    engine = hf(policy, limit) if name == "hf" else vllm(model_dir(), limit)
    engine._stop = StopTexts(stop, processors()[0])  # vLLM gets it with each request: no need to start another engine
    engine.update_weights(policy, 0)
    return engine


def cut(distribution: torch.Tensor, top_p: float, top_k: int | None) -> torch.Tensor:
    """Return the log-probs of the k most probable tokens, and of these the fewest with probability top_p. [R, V] float64"""
    rows = []
    for row in distribution:
        order = row.argsort(descending=True)[: top_k or None]
        share = row[order].softmax(0)
        kept = order[share.cumsum(0) - share < top_p]
        rows.append(torch.full_like(row, -torch.inf).index_copy(0, kept, F.log_softmax(row[kept], 0)))
    return torch.stack(rows)


@torch.no_grad()
def say(policy: Policy, last: int, tokens: list[int]) -> None:
    """Change the weights so that greedy responses are `tokens`, all different. last: the prompt's last token.

    Layers add nothing to the embedding, and the head gives each token's successor the largest logit.
    """
    for name, weight in policy.language_model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.zero_()
    head, embedding = policy.model.lm_head.weight, policy.language_model.embed_tokens.weight
    head.zero_()
    for before, after in zip([last, *tokens[:-1]], tokens, strict=True):
        head[after] = 10 * F.normalize(embedding[before], dim=0)
