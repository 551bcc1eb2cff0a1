"""Rollouts by transformers' batched `generate`, which is always available.

It uses the trainer's own weights, so there is nothing to sync; under ZeRO-3 it uses a full copy of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mssr.batch import Prompt
from mssr.config.schema import RolloutConfig
from mssr.policy.model import Policy
from mssr.policy.sharding import WholeCopy
from mssr.rollout.base import OnResponse, Request, RolloutEngine, Sampling
from mssr.rollout.stop import StopTexts


class HFRollout(RolloutEngine):
    name = "hf"

    def __init__(
        self,
        config: RolloutConfig,
        policy: Policy,
        ends: list[int],
        pad: int,
        device: torch.device,
        stop: StopTexts | None = None,
    ) -> None:
        super().__init__(config, ends, pad, stop)
        self._copy: WholeCopy | None = None
        self._policy = policy
        self._device = device

    def update_weights(self, policy: Policy, version: int) -> None:
        """Update the full copy under ZeRO-3 (a collective); otherwise the trainer's own parameters are used."""
        if policy.partitioned:
            if self._copy is None:
                self._copy = WholeCopy(policy, self._device)
            else:
                self._copy.update(policy)
            self._policy = self._copy.policy
        self._weight_version = version

    def _sample(self, requests: list[Request], sampling: Sampling, finished: OnResponse) -> None:
        training = self._policy.training
        self._policy.eval()  # gradient checkpointing would turn the cache off
        # Group rows of similar expected length, then prompts of similar length.
        requests = sorted(requests, key=lambda one: (-one.expected_tokens, len(one.prompt.token_ids)))
        for start in range(0, len(requests), self._config.batch_size):
            chosen = requests[start : start + self._config.batch_size]
            tokens, logp = self._generate([one.prompt for one in chosen], [one.stream for one in chosen], sampling)
            for one, row_tokens, row_logp in zip(chosen, tokens.tolist(), logp.tolist()):
                finished(one.row, self._response(row_tokens, row_logp))
        self._policy.train(training)

    def release(self) -> None:
        """Free the copy of the weights. The cache of keys and values is freed with each batch."""
        if self._copy:
            self._copy = self._policy = self._weight_version = None

    def _generate(self, prompts: list[Prompt], streams: list[int], sampling: Sampling) -> tuple[Tensor, Tensor]:
        """Return [B, R] tokens (undefined after the response's end) and their log-probs, on the CPU."""
        limit = self._config.max_response_tokens
        sampler = TokenSampler(streams, limit, sampling, self._device)
        longest = max(len(prompt.token_ids) for prompt in prompts)
        ids = torch.stack([_left_pad(prompt.token_ids, longest, self._pad) for prompt in prompts])
        attention = torch.stack([_left_pad(torch.ones_like(p.token_ids), longest, 0) for p in prompts])
        pictured = [prompt for prompt in prompts if prompt.pixel_values is not None]
        images = {}
        if pictured:
            images = {
                "pixel_values": torch.cat([prompt.pixel_values for prompt in pictured]).to(self._device),
                "image_grid_thw": torch.cat([prompt.image_grid_thw for prompt in pictured]).to(self._device),
                "mm_token_type_ids": (ids == self._policy.image_token_id).int().to(self._device),
            }
        settings = GenerationConfig(
            max_new_tokens=limit, do_sample=False, use_cache=True, eos_token_id=self._ends, pad_token_id=self._pad
        )
        with _only_these_settings(self._policy.model, settings):
            sequences = self._policy.model.generate(
                input_ids=ids.to(self._device),
                attention_mask=attention.to(self._device),
                logits_processor=LogitsProcessorList([sampler]),
                stopping_criteria=StoppingCriteriaList([StopsAtTexts(self._stop, longest)] if self._stop.texts else []),
                **images,
            )
        return sequences[:, longest:].cpu(), torch.stack(sampler.logps, dim=1).cpu()


class TokenSampler(LogitsProcessor):
    """Draws each row's tokens from its own noise stream, and records their log-probs.

    It inverts the cumulative distribution at one uniform number per token, so a response depends only on its stream and
    the weights, not on the rest of the batch or the number of ranks. It returns scores whose maximum, which `generate`
    takes, is the token drawn.

    logps: after generation, one [B] float32 tensor per position: log-prob under the distribution drawn from.
    """

    def __init__(self, streams: list[int], max_tokens: int, sampling: Sampling, device: torch.device) -> None:
        self.logps: list[Tensor] = []
        self._temperature = sampling.temperature
        self._cuts = LogitsProcessorList()
        if sampling.temperature and sampling.top_k:
            self._cuts.append(TopKLogitsWarper(sampling.top_k))
        if sampling.temperature and sampling.top_p < 1:
            self._cuts.append(TopPLogitsWarper(sampling.top_p))
        generator = torch.Generator()
        uniform = [
            torch.rand(max_tokens, generator=generator.manual_seed(stream), dtype=torch.float64) for stream in streams
        ]
        self._uniform = torch.stack(uniform).to(device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.float()
        logp = torch.log_softmax(self._cuts(input_ids, scores / (self._temperature or 1.0)), dim=-1)
        if self._temperature == 0:
            token = scores.argmax(-1, keepdim=True)
        else:
            cumulative = logp.double().exp_().cumsum(-1)
            uniform = self._uniform[:, len(self.logps), None] * cumulative[:, -1:]
            token = torch.searchsorted(cumulative, uniform, right=True).clamp_(max=scores.shape[-1] - 1)
        self.logps.append(logp.gather(1, token).squeeze(1))
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


class StopsAtTexts(StoppingCriteria):
    """Ends the rows whose last tokens have a stop text. start: position of the first response token."""

    def __init__(self, stop: StopTexts, start: int) -> None:
        self._stop, self._start = stop, start

    def __call__(self, input_ids: Tensor, scores, **_) -> Tensor:
        last = input_ids[:, self._start :][:, -self._stop.longest :]
        return torch.tensor(self._stop.found(last.tolist()), device=input_ids.device)


@contextmanager
def _only_these_settings(model, settings: GenerationConfig) -> Iterator[None]:
    """Replace the model's generation config: penalties in it (Qwen2.5-VL has one) would make samples off-policy, and
    `generate` takes from it what a config passed as an argument leaves unset."""
    own, model.generation_config = model.generation_config, settings
    try:
        yield
    finally:
        model.generation_config = own


def end_token_ids(policy: Policy, tokenizer) -> list[int]:
    """Return the tokens that end a response, by the model's generation config and the tokenizer."""
    ends = policy.model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return sorted({end for end in [*ends, tokenizer.eos_token_id] if end is not None})


def _left_pad(values: Tensor, length: int, fill: int) -> Tensor:
    return torch.nn.functional.pad(values, (length - len(values), 0), value=fill)
