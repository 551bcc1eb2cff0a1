"""The interface of rollout engines, and what they share."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mssr.batch import Prompt, Rollouts, pad_rows
from mssr.config.schema import RolloutConfig
from mssr.policy.model import Policy
from mssr.rollout.stop import StopTexts


@dataclass(frozen=True, eq=False)
class Response:
    """One sampled response.

    tokens: [R] int64, with the end token or the stop text. logp: [R] float32, each token's log-prob when it was sampled,
    under the distribution that it was drawn from.
    truncated: ended by the token limit, not by an end token or a stop text.
    weight_version: of the weights that sampled it (`RolloutEngine.update_weights`).
    """

    tokens: Tensor
    logp: Tensor
    truncated: bool
    weight_version: int


OnResponse = Callable[[int, Response], None]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn from the policy.

    temperature: 0 is greedy, with log-probs at temperature 1; nothing is cut off then.
    top_k: only the k most probable tokens; 0: all. top_p: of these, the smallest set with at least this probability; 1: all.
    """

    temperature: float
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt to answer: its row in the call, its noise stream, and the estimated length of its response."""

    row: int
    prompt: Prompt
    stream: int
    expected_tokens: float


class RolloutEngine(ABC):
    """Samples one response per prompt from the policy, with the log-prob of each sampled token.

    A step calls `update_weights`, `generate` as often as needed, and `release`. An engine implements `update_weights`, which
    sets `_weight_version`, and `_sample`.
    """

    name: str

    def __init__(self, config: RolloutConfig, ends: list[int], pad: int, stop: StopTexts | None = None) -> None:
        """ends: tokens that end a response. stop: texts that do. pad: token that fills a batch after it."""
        self._config, self._ends, self._pad = config, ends, pad
        self._stop = stop or StopTexts()
        self._weight_version: int | None = None  # None: nothing to sample from

    @abstractmethod
    def update_weights(self, policy: Policy, version: int) -> None:
        """Make the next `generate` sample from the policy's current weights. Collective over the ranks.

        version: number of steps that these weights were trained for; responses carry it.
        """

    @torch.no_grad()
    def generate(
        self,
        prompts: list[Prompt],
        streams: list[int],
        temperature: float,
        *,
        top_p: float = 1.0,
        top_k: int | None = None,
        expected_tokens: list[float] | None = None,
        on_response: OnResponse | None = None,
    ) -> Rollouts:
        """Return one response for each prompt, in the given order.

        streams: one noise stream (64-bit seed) per prompt; the same call with the same weights gives the same responses.
        temperature, top_p, top_k: see `Sampling`.
        expected_tokens: estimated length of each response; the longest ones start first.
        on_response: called with (row, response) as soon as a response is complete, while others are still generated.
        """
        if self._weight_version is None:
            raise RuntimeError("generate: the engine has no weights; call update_weights first")
        found: dict[int, Response] = {}

        def finished(row: int, response: Response) -> None:
            found[row] = response
            if on_response is not None:
                on_response(row, response)

        expected = expected_tokens or [0.0] * len(prompts)
        requests = map(Request, range(len(prompts)), prompts, streams, expected)
        sampling = Sampling(temperature, top_p, top_k or 0)
        self._sample(sorted(requests, key=lambda request: -request.expected_tokens), sampling, finished)
        return collect(prompts, [found[row] for row in range(len(prompts))], self._pad)

    @abstractmethod
    def _sample(self, requests: list[Request], sampling: Sampling, finished: OnResponse) -> None:
        """Answer the requests, in the order in which to start them; call `finished` once for each row."""

    def _response(self, tokens: list[int], logp: list[float]) -> Response:
        """Return the response in what was generated: up to the first end token, or to the first stop text if that is
        earlier. logp: log-prob of each token.
        """
        ends = set(self._ends)
        end = next((number for number, token in enumerate(tokens, 1) if token in ends), None)
        stop = self._stop.length(tokens[:end])
        length = stop or end or len(tokens)
        return Response(
            tokens=torch.tensor(tokens[:length]),
            logp=torch.tensor(logp[:length], dtype=torch.float32),
            truncated=stop is None and end is None,
            weight_version=self._weight_version,
        )

    def release(self) -> None:  # noqa: B027  an engine that uses no GPU memory has nothing to do
        """Free GPU memory until the next `update_weights`."""

    def close(self) -> None:  # noqa: B027
        """Stop what the engine started. It cannot be used afterwards."""


def collect(prompts: list[Prompt], responses: list[Response], pad: int) -> Rollouts:
    """Rollouts of B prompts; B may be 0, on a rank without prompts."""
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
    """Return one 64-bit noise stream per slot of a step's batch.

    A slot is a position in the *global* batch, so the streams do not depend on the number of ranks. No two prompts,
    visits of a prompt or purposes ("train", "init", "eval") have the same stream.
    """
    return [
        int.from_bytes(hashlib.blake2b(f"{seed}/{purpose}/{step}/{slot}".encode(), digest_size=8).digest(), "little")
        for slot in slots
    ]


def merged_stream(streams: list[int]) -> int:
    """Return one 63-bit seed for a whole call, for engines that draw all their noise from one generator."""
    digest = hashlib.blake2b(" ".join(map(str, streams)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
