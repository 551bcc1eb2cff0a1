"""Rollouts by transformers' batched `generate`, on the trainer's own weights: always available, nothing to sync."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from mssr.batch import Prompt, RolloutBatch, pad_rows
from mssr.config import RolloutConfig
from mssr.policy.model import Policy


class HFRollout:
    name = "hf"

    def __init__(self, policy: Policy, tokenizer, config: RolloutConfig, device: torch.device) -> None:
        self._policy = policy
        self._config = config
        self._device = device
        model_config = policy.model.config
        self._pad = tokenizer.pad_token_id
        self._ends = end_token_ids(policy, tokenizer)
        # A sampled image pad would make the trainer look for an image that is not there.
        self._forbidden = [model_config.image_token_id, model_config.video_token_id]

    def update_weights(self, policy: Policy) -> None:
        """Nothing to do: the engine reads the trainer's own parameters."""

    @torch.no_grad()
    def generate(self, prompts: list[Prompt], streams: list[int], temperature: float) -> RolloutBatch:
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i].token_ids))
        responses: list[Tensor] = [None] * len(prompts)
        logps: list[Tensor] = [None] * len(prompts)
        training = self._policy.training
        self._policy.eval()  # gradient checkpointing would switch the cache off
        for start in range(0, len(by_length), self._config.batch_size):
            chosen = by_length[start : start + self._config.batch_size]
            tokens, logp = self._generate([prompts[i] for i in chosen], [streams[i] for i in chosen], temperature)
            for i, row_tokens, row_logp in zip(chosen, tokens, logp):
                length = self._length(row_tokens)
                responses[i], logps[i] = row_tokens[:length], row_logp[:length]
        self._policy.train(training)

        longest = max(map(len, responses))
        lengths = torch.tensor([len(response) for response in responses])
        return RolloutBatch(
            prompts=tuple(prompts),
            tokens=pad_rows(responses, longest, self._pad),
            mask=torch.arange(longest) < lengths[:, None],
            logp=pad_rows(logps, longest),
            truncated=torch.tensor([int(response[-1]) not in self._ends for response in responses]),
        )

    def _generate(self, prompts: list[Prompt], streams: list[int], temperature: float) -> tuple[Tensor, Tensor]:
        """[B, R] tokens (garbage after the end token) and their log-probs, on the CPU."""
        limit = self._config.max_response_tokens
        sampler = TokenSampler(streams, limit, temperature, self._forbidden, self._device)
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
                **images,
            )
        return sequences[:, longest:].cpu(), torch.stack(sampler.logps, dim=1).cpu()

    def _length(self, tokens: Tensor) -> int:
        ends = torch.isin(tokens, torch.tensor(self._ends)).nonzero()
        return int(ends[0]) + 1 if len(ends) else len(tokens)


class TokenSampler(LogitsProcessor):
    """Draws each row's tokens from its own noise stream, and keeps the log-prob of what it drew.

    The draw inverts the distribution's cumulative sum at one uniform number a token, so a response depends on its
    stream and the weights alone: not on its neighbours, the batch size or the number of ranks. `generate` then takes the
    maximum, which is the token drawn.

    logps: after generation, one [B] float32 tensor a position: log-prob under the distribution drawn from.
    """

    def __init__(
        self, streams: list[int], max_tokens: int, temperature: float, forbidden: list[int], device: torch.device
    ) -> None:
        self.logps: list[Tensor] = []
        self._temperature = temperature
        self._forbidden = forbidden
        generator = torch.Generator()
        uniform = [
            torch.rand(max_tokens, generator=generator.manual_seed(stream), dtype=torch.float64) for stream in streams
        ]
        self._uniform = torch.stack(uniform).to(device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.float()
        scores[:, self._forbidden] = -torch.inf
        logp = torch.log_softmax(scores / (self._temperature or 1.0), dim=-1)
        if self._temperature == 0:
            token = scores.argmax(-1, keepdim=True)
        else:
            cumulative = logp.double().exp_().cumsum(-1)
            uniform = self._uniform[:, len(self.logps), None] * cumulative[:, -1:]
            token = torch.searchsorted(cumulative, uniform, right=True).clamp_(max=scores.shape[-1] - 1)
        self.logps.append(logp.gather(1, token).squeeze(1))
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


@contextmanager
def _only_these_settings(model, settings: GenerationConfig) -> Iterator[None]:
    """Takes the model's own generation config away: penalties in it (Qwen2.5-VL ships one) make samples off-policy, and
    `generate` would fill in from it what a config given as an argument leaves open."""
    own, model.generation_config = model.generation_config, settings
    try:
        yield
    finally:
        model.generation_config = own


def end_token_ids(policy: Policy, tokenizer) -> list[int]:
    """Every token that ends a response, by the model's generation config and the tokenizer."""
    ends = policy.model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return sorted({end for end in [*ends, tokenizer.eos_token_id] if end is not None})


def _left_pad(values: Tensor, length: int, fill: int) -> Tensor:
    return torch.nn.functional.pad(values, (length - len(values), 0), value=fill)
