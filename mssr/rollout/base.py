"""What the loop asks of a rollout engine."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mssr.batch import Prompt, Rollouts, pad_rows
from mssr.policy.model import Policy


@dataclass(frozen=True, eq=False)
class Response:
    """One sampled response.

    tokens: [R] int64, end token included. logp: [R] float32, each token's log-prob when it was sampled.
    truncated: stopped by the token limit, not by an end token.
    weight_version: of the weights that sampled it (`RolloutEngine.update_weights`).
    """

    tokens: Tensor
    logp: Tensor
    truncated: bool
    weight_version: int


OnResponse = Callable[[int, Response], None]


class RolloutEngine(Protocol):
    """Samples one response a prompt from the policy and reports each sampled token's log-prob.

    The order of a step: `update_weights`, `generate` as often as needed, `release`.
    """

    name: str

    def update_weights(self, policy: Policy, version: int) -> None:
        """Makes the next `generate` sample from the policy's weights as they are now. Collective over the ranks.

        version: what the responses will be marked with, the number of steps these weights were trained for.
        """
        ...

    def generate(
        self,
        prompts: list[Prompt],
        streams: list[int],
        temperature: float,
        *,
        expected_tokens: list[float] | None = None,
        on_response: OnResponse | None = None,
    ) -> Rollouts:
        """One response for each prompt, in the given order.

        streams: one noise stream (64-bit seed) for each prompt; the same call with the same weights gives the same
            responses.
        temperature: 0 is greedy (log-probs are then those at temperature 1).
        expected_tokens: how long each response will be, as far as one knows; long ones are begun first.
        on_response: called with (row, response) as soon as a response is complete, while others still generate.
        """
        ...

    def release(self) -> None:
        """Gives GPU memory back until the next `update_weights`."""
        ...

    def close(self) -> None:
        """Ends what the engine started; it is not used any more."""
        ...


def collect(prompts: list[Prompt], responses: list[Response], pad: int) -> Rollouts:
    """Rollouts of B prompts; B may be 0, on a rank that has nothing to ask."""
    longest = max((len(response.tokens) for response in responses), default=0)
    return Rollouts.of(
        prompts,
        [response.tokens for response in responses],
        pad,
        logp=pad_rows([response.logp for response in responses], longest),
        truncated=torch.tensor([response.truncated for response in responses], dtype=torch.bool),
        weight_version=torch.tensor([response.weight_version for response in responses], dtype=torch.int64),
    )


def noise_streams(seed: int, purpose: str, step: int, slots: list[int]) -> list[int]:
    """One 64-bit noise stream for each slot of a step's batch.

    A slot is a position in the *global* batch, so the streams do not depend on how many ranks share it; and no two
    prompts, visits of a prompt or purposes ("train", "init", "eval") have the same stream.
    """
    return [
        int.from_bytes(hashlib.blake2b(f"{seed}/{purpose}/{step}/{slot}".encode(), digest_size=8).digest(), "little")
        for slot in slots
    ]


def merged_stream(streams: list[int]) -> int:
    """One 63-bit seed for a whole call, for engines that draw all their noise from one generator."""
    digest = hashlib.blake2b(" ".join(map(str, streams)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
