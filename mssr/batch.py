"""Data of a training step. Each type is built once, with all its fields.

Prompt -> Rollouts (sampled) -> GradedRollouts (with rewards) -> UpdateBatch (what the loss needs)
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Prompt:
    """One problem: tokens and preprocessed images. Rollout, scoring and update share the tensors.

    key: content hash of image bytes and text; the value tracker's key.
    row: row number in the dataset.
    problem, answer, solution: text as in the row (solution: a worked response for `mssr sft`, or None).
    token_ids: [P] int64, each image's pad token repeated once per image token.
    pixel_values: [patches, channels * temporal * patch * patch] float32, or None without images.
    image_grid_thw: [images, 3] int64, or None.
    images: bytes of the image files, for the rollout viewer and for engines that preprocess themselves.
    columns: the row's other columns, for the reward. rendered: the prompt as text, one image token per image.
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
    columns: dict[str, Any] = field(default_factory=dict)
    rendered: str = ""


@dataclass(frozen=True, eq=False)
class Sequences:
    """B prompts and their responses on one rank: the input of a forward pass. R is the longest response's length.

    prompts: the prompt of each response; several responses to a prompt share one object.
    tokens: [B, R] int64 response tokens, end token included, right-padded.
    mask: [B, R] bool, True at response tokens.
    """

    prompts: tuple[Prompt, ...]
    tokens: Tensor
    mask: Tensor

    @classmethod
    def of(cls, prompts: Sequence[Prompt], responses: list[Tensor], pad: int = 0, **fields) -> Self:
        """Build from B one-dimensional int64 tensors; B may be 0. fields: the subclass's other fields."""
        lengths = torch.tensor([len(response) for response in responses], dtype=torch.int64)
        longest = max(map(len, responses), default=0)
        tokens = pad_rows(responses, longest, pad).long()
        return cls(tuple(prompts), tokens, torch.arange(longest) < lengths[:, None], **fields)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> Tensor:
        """[B] int64, number of tokens of each response."""
        return self.mask.sum(1)

    @property
    def keys(self) -> list[str]:
        return [prompt.key for prompt in self.prompts]

    def response(self, row: int) -> Tensor:
        """Return the response of a row without padding, [R_row] int64."""
        return self.tokens[row, : int(self.mask[row].sum())]

    def rows(self, start: int, end: int) -> Self:
        """Return rows start..end-1."""
        values = (getattr(self, each.name) for each in fields(self))
        return type(self)(*(None if value is None else value[start:end] for value in values))


@dataclass(frozen=True, eq=False)
class Rollouts(Sequences):
    """Sampled responses, as a rollout engine returns them.

    logp: [B, R] float32, the sampler's log-prob of each token in the distribution drawn from; 0 on padding.
    truncated: [B] bool, True for a response cut off by the token limit.
    weight_version: [B] int64, number of training steps that the sampler's weights had seen.
    """

    logp: Tensor
    truncated: Tensor
    weight_version: Tensor


@dataclass(frozen=True, eq=False)
class GradedRollouts(Rollouts):
    """Rollouts with their rewards.

    reward: [B] float32, the weighted sum of the parts; any finite number.
    correct: [B] float32 in [0, 1], the success that the value tracker learns (the part `reward.success`).
    graded: [B] bool, False for a response without a grade (`reward.on_error: skip`): neither loss nor tracker sees it.
    masked: [B] bool, True for a response that only the loss leaves out.
    parts: what the reward functions returned for each response, by name.
    texts: the decoded responses.
    """

    reward: Tensor
    correct: Tensor
    graded: Tensor
    masked: Tensor
    parts: tuple[dict[str, float], ...]
    texts: tuple[str, ...]

    @property
    def loss_mask(self) -> Tensor:
        """[B, R] bool, True at the tokens that count in the loss."""
        return self.mask & (self.graded & ~self.masked)[:, None]

    def with_rows(self, rows: list[int], others: "GradedRollouts") -> "GradedRollouts":
        """Return a copy in which row rows[i] is row i of `others`."""
        longest = max(self.tokens.shape[1], others.tokens.shape[1])
        values = {}
        for each in fields(self):
            own, new = getattr(self, each.name), getattr(others, each.name)
            if isinstance(own, tuple):
                merged = dict(enumerate(own)) | dict(zip(rows, new, strict=True))
                values[each.name] = tuple(merged.values())
            else:
                index = torch.tensor(rows, dtype=torch.int64)
                values[each.name] = _widened(own, longest).index_copy(0, index, _widened(new, longest))
        return GradedRollouts(**values)


@dataclass(frozen=True, eq=False)
class UpdateBatch(Sequences):
    """Input of the policy loss.

    loss_mask: [B, R] bool, True at the tokens that count in the loss.
    logp: [B, R] float32, the sampler's log-probs.
    advantage: [B] float32.
    old_logp: [B, R] float32, the denominator of the policy ratio.
    ref_logp: [B, R] float32 under the KL reference (`mssr.policy.reference`); None for a loss without a KL term.
    """

    loss_mask: Tensor
    logp: Tensor
    advantage: Tensor
    old_logp: Tensor
    ref_logp: Tensor | None


def _widened(values: Tensor, length: int) -> Tensor:
    """Pad [B, R] to [B, length] with zeros; return [B] as it is."""
    if values.dim() == 1:
        return values
    return torch.nn.functional.pad(values, (0, length - values.shape[1]))


def pad_rows(rows: list[Tensor], length: int, fill: float = 0) -> Tensor:
    """Stack B one-dimensional tensors to [B, length], right-padded with `fill`."""
    padded = rows[0].new_full((len(rows), length), fill) if rows else torch.empty(0, length)
    for row, values in enumerate(rows):
        padded[row, : len(values)] = values
    return padded
