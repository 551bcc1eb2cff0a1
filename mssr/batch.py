"""What travels through a step: prompts, and one rollout of each row."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Prompt:
    """One problem, tokenised, its images preprocessed (once: rollout, scoring and update all use these tensors).

    key: content hash of the image bytes and the text; what the value tracker is keyed by.
    row: index of the row in its dataset.
    problem, answer, solution: text as in the row (solution: a worked response for `mssr sft`, or None).
    token_ids: [P] int64, each image's pad token repeated once per image token.
    pixel_values: [patches, channels * temporal * patch * patch] float32, or None without images.
    image_grid_thw: [images, 3] int64, or None.
    images: the encoded files' bytes, for records and for engines that preprocess on their own.
    """

    key: str
    row: int
    problem: str
    answer: str
    solution: str | None
    token_ids: Tensor
    pixel_values: Tensor | None
    image_grid_thw: Tensor | None
    images: tuple[bytes, ...]


@dataclass(frozen=True, eq=False)
class RolloutBatch:
    """One rank's share of a step: B responses, R the longest one.

    prompts: the prompt of each response; with several responses a prompt, the same object as often.
    tokens: [B, R] int64 response tokens, end token included, right-padded.
    mask: [B, R] bool, True where a token was sampled.
    logp: [B, R] float32, log-prob of the sampled token when it was sampled, at the sampling temperature; 0 under the padding.
    truncated: [B] bool, stopped by the token limit instead of an end token.
    weight_version: [B] int64, steps that the weights were trained for that sampled each; None if nobody sampled.
    masked: [B] bool, left out of the loss; None: all of them count.
    reward, correct: [B] float32 in [0, 1]; correct ignores the format reward.
    baseline: [B] float32, the tracker's values; None without a tracker. advantage: [B] float32; None until it is computed.
    old_logp: [B, R] float32, the denominator of the policy ratio; None: on-policy, ratio 1.
    ref_logp: [B, R] float32 under what the KL term pulls to (`mssr.policy.reference`); None without a KL term.
    """

    prompts: tuple[Prompt, ...]
    tokens: Tensor
    mask: Tensor
    logp: Tensor
    truncated: Tensor
    weight_version: Tensor | None = None
    masked: Tensor | None = None
    reward: Tensor | None = None
    correct: Tensor | None = None
    baseline: Tensor | None = None
    advantage: Tensor | None = None
    old_logp: Tensor | None = None
    ref_logp: Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> Tensor:
        """[B] int64, sampled tokens of each response."""
        return self.mask.sum(1)

    @property
    def loss_mask(self) -> Tensor:
        """[B, R] bool, True where a token was sampled that counts in the loss."""
        return self.mask if self.masked is None else self.mask & ~self.masked[:, None]

    @property
    def keys(self) -> list[str]:
        return [prompt.key for prompt in self.prompts]

    def rows(self, start: int, end: int) -> "RolloutBatch":
        """Rows start..end-1 as a batch of their own."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return RolloutBatch(**{name: None if value is None else value[start:end] for name, value in parts.items()})

    def with_rows(self, rows: list[int], others: "RolloutBatch") -> "RolloutBatch":
        """A copy in which row rows[i] is row i of `others`, a batch with values for the same fields."""
        longest = max(self.tokens.shape[1], others.tokens.shape[1])
        prompts = list(self.prompts)
        for row, prompt in zip(rows, others.prompts, strict=True):
            prompts[row] = prompt
        values = {}
        for field in fields(self):
            own, new = getattr(self, field.name), getattr(others, field.name)
            if field.name != "prompts" and own is not None:
                own, new = _widened(own, longest), _widened(new, longest)
                values[field.name] = own.index_copy(0, torch.tensor(rows, dtype=torch.int64), new)
        return RolloutBatch(prompts=tuple(prompts), **values)

    def response(self, row: int) -> Tensor:
        """[R_row] int64, the row's tokens without padding."""
        return self.tokens[row, : int(self.mask[row].sum())]


def _widened(values: Tensor, length: int) -> Tensor:
    """[B, R] -> [B, length], what is new 0 (what lies under the padding does not matter); [B] as it is."""
    if values.dim() == 1:
        return values
    return torch.nn.functional.pad(values, (0, length - values.shape[1]))


def pad_rows(rows: list[Tensor], length: int, fill: float = 0) -> Tensor:
    """[B, length] from B one-dimensional tensors of at most that length, right-padded with `fill`."""
    padded = rows[0].new_full((len(rows), length), fill) if rows else torch.empty(0, length)
    for row, values in enumerate(rows):
        padded[row, : len(values)] = values
    return padded
