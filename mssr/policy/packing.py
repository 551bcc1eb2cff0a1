"""Packs sequences of different lengths end to end into rows without padding, up to a token budget."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mssr.batch import Sequences
from mssr.policy.attention import PackedLayout

IGNORED = -100  # target of a token that is not in the loss


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Some rows of `Sequences`, packed into L tokens, N of them response tokens.

    input_ids: [1, L] int64.
    position_ids: [4, 1, L] int64: position in the sequence; temporal, height and width rotary positions.
    mm_token_type_ids: [1, L] int32, 1 on image tokens, else 0.
    layout: positions of the sequences.
    pixel_values, image_grid_thw: the images in packed order, or None.
    predicts: [N] int64, packed position of the token before each response token, whose hidden state predicts it.
    target: [N] int64, the response tokens.
    row, column: [N] int64 on the CPU, position of each response token in [B, R]; [0] in an idle micro-batch.
    """

    input_ids: Tensor
    position_ids: Tensor
    mm_token_type_ids: Tensor
    layout: PackedLayout
    pixel_values: Tensor | None
    image_grid_thw: Tensor | None
    predicts: Tensor
    target: Tensor
    row: Tensor
    column: Tensor


def plan_micro_batches(lengths: list[int], token_budget: int, at_least: int = 1) -> list[list[int]]:
    """Split rows into few, evenly filled groups within the budget; return the row numbers of each group, ascending.

    Greedy: longest row first, into the emptiest group. A row longer than the budget gets its own group.

    lengths: tokens of each row.
    at_least: minimum number of groups, some possibly empty: under ZeRO-2 ranks must make the same number of backward passes.
    """
    over = sum(length > token_budget for length in lengths)
    within = sum(length for length in lengths if length <= token_budget)
    count = max(at_least, over + math.ceil(within / token_budget))
    longest_first = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    while True:
        groups, load = [[] for _ in range(count)], [0] * count
        for row in longest_first:
            emptiest = load.index(min(load))
            groups[emptiest].append(row)
            load[emptiest] += lengths[row]
        if all(total <= token_budget or len(group) == 1 for group, total in zip(groups, load)):
            return [sorted(group) for group in groups]
        count += 1


def pack(batch: Sequences, rows: list[int], prompt_positions, image_token_id: int | None, device) -> MicroBatch:
    """Pack the given rows.

    prompt_positions: Prompt -> [3, P] int64 rotary positions (`Policy.prompt_positions`).
    image_token_id: None for a text model.
    """
    ids, positions, predicts, target, column, lengths = [], [], [], [], [], []
    start = 0
    for row in rows:
        prompt, response = batch.prompts[row], batch.response(row)
        rotary = prompt_positions(prompt)
        after = rotary.max() + 1 + torch.arange(len(response))
        rotary = torch.cat([rotary, after.expand(3, -1)], dim=1)
        length = rotary.shape[1]
        positions.append(torch.cat([torch.arange(length)[None], rotary]))
        ids += [prompt.token_ids, response]
        predicts.append(start + len(prompt.token_ids) - 1 + torch.arange(len(response)))
        target.append(response)
        column.append(torch.arange(len(response)))
        lengths.append(length)
        start += length
    images = [batch.prompts[row] for row in rows if batch.prompts[row].pixel_values is not None]
    input_ids = torch.cat(ids)[None]
    is_image = torch.zeros_like(input_ids) if image_token_id is None else input_ids == image_token_id
    owner = torch.tensor(rows).repeat_interleave(torch.tensor([len(part) for part in target]))

    return MicroBatch(
        input_ids=input_ids.to(device),
        position_ids=torch.cat(positions, dim=1)[:, None].to(device),
        mm_token_type_ids=is_image.int().to(device),
        layout=PackedLayout.of(lengths, device),
        pixel_values=torch.cat([prompt.pixel_values for prompt in images]).to(device) if images else None,
        image_grid_thw=torch.cat([prompt.image_grid_thw for prompt in images]).to(device) if images else None,
        predicts=torch.cat(predicts).to(device),
        target=torch.cat(target).to(device),
        row=owner,
        column=torch.cat(column),
    )


def idle_micro_batch(device: torch.device) -> MicroBatch:
    """Return two text tokens, the second an ignored target: for a rank without rows while others have some."""
    return MicroBatch(
        input_ids=torch.zeros(1, 2, dtype=torch.int64, device=device),
        position_ids=torch.arange(2, device=device).repeat(4, 1, 1),
        mm_token_type_ids=torch.zeros(1, 2, dtype=torch.int32, device=device),
        layout=PackedLayout.of([2], device),
        pixel_values=None,
        image_grid_thw=None,
        predicts=torch.zeros(1, dtype=torch.int64, device=device),
        target=torch.full((1,), IGNORED, device=device),
        row=torch.empty(0, dtype=torch.int64),
        column=torch.empty(0, dtype=torch.int64),
    )
