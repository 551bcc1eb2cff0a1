"""What the loop asks of a rollout engine."""

import hashlib
from typing import Protocol

from mssr.batch import Prompt, RolloutBatch
from mssr.policy.model import Policy


class RolloutEngine(Protocol):
    """Samples one response a prompt from the current policy and reports each sampled token's log-prob."""

    name: str

    def generate(self, prompts: list[Prompt], streams: list[int], temperature: float) -> RolloutBatch:
        """One response for each prompt, in the given order.

        streams: one noise stream (64-bit seed) for each prompt; equal streams and weights give equal responses.
        temperature: 0 is greedy (log-probs are then those at temperature 1).
        """
        ...

    def update_weights(self, policy: Policy) -> None:
        """Makes the next `generate` sample from the policy's weights as they are now."""
        ...


def noise_streams(seed: int, purpose: str, step: int, slots: list[int]) -> list[int]:
    """One 64-bit noise stream for each slot of a step's batch.

    A slot is a position in the *global* batch, so the streams do not depend on how many ranks share it; and no two
    prompts, visits of a prompt or purposes ("train", "init", "eval") have the same stream.
    """
    return [
        int.from_bytes(hashlib.blake2b(f"{seed}/{purpose}/{step}/{slot}".encode(), digest_size=8).digest(), "little")
        for slot in slots
    ]
