"""Samples responses: three engines (transformers, vLLM in the process, vLLM servers) behind one interface."""

from typing import TYPE_CHECKING

import mssr.extras  # noqa: F401  first: the vLLM installer, a command, begins here
from mssr.config.resolve import engine_name, why_no_vllm

if TYPE_CHECKING:  # `mssr serve` and the vLLM installer import this package and need none of the trainer's libraries
    from mssr.config import Config
    from mssr.distributed import World
    from mssr.policy.model import Policy
    from mssr.rollout.base import RolloutEngine


def make_rollout_engine(config: "Config", policy: "Policy", tokenizer, world: "World") -> "RolloutEngine":
    """Return the engine of this run, without weights: call `update_weights` first. Collective over the ranks."""
    from mssr.rollout.hf import HFRollout, end_token_ids
    from mssr.rollout.stop import StopTexts

    ends, pad = end_token_ids(policy, tokenizer), tokenizer.pad_token_id
    stop = StopTexts(config.rollout.stop, tokenizer)
    match engine_name(config.rollout.engine, world.device.type):
        case "vllm":
            from mssr.rollout.vllm.engine import VLLMRollout

            return VLLMRollout(config, policy, ends, pad, world, stop)
        case "servers":
            from mssr.rollout.servers.rollout import ServerRollout

            return ServerRollout(config.rollout, policy, ends, pad, world, stop)
        case "hf":
            if config.rollout.engine == "auto" and world.is_main:
                print(f"mssr: rollout.engine auto: hf, because {why_no_vllm(world.device.type)}", flush=True)
            return HFRollout(config.rollout, policy, ends, pad, world.device, stop)
