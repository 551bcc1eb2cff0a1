"""Rollouts: one response for each prompt, behind one interface, one file an engine."""

from mssr.config import RolloutConfig
from mssr.distributed import World
from mssr.policy.model import Policy
from mssr.rollout.base import RolloutEngine
from mssr.rollout.hf import HFRollout


def make_rollout_engine(config: RolloutConfig, policy: Policy, tokenizer, world: World) -> RolloutEngine:
    """The engine of this run: transformers' `generate`, the only one there is so far."""
    return HFRollout(policy, tokenizer, config, world.device)
