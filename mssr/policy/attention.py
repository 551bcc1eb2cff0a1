"""Attention over packed sequences with PyTorch's SDPA: no flash-attn needed, no [L, L] mask built.

Packed, S sequences lie end to end in one row of L tokens. A block-diagonal mask would cost L^2; instead each
attention call views the row as [S, longest] (right-padded), runs causal SDPA and goes back. Right padding needs no mask:
a causal query never looks right, and the padded queries' outputs are dropped. So the cost is S * longest^2, and the
fused causal kernels of CPU and GPU apply.

The layout reaches the attention through transformers' own argument: a dict given as `attention_mask` is handed to the
layers as it is (the hook `generate` uses for prepared masks).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "mssr_packed_sdpa"


@dataclass(frozen=True, eq=False)
class PackedLayout:
    """Where the tokens of each packed sequence are.

    gather: [S * longest] int64, packed position of each padded slot (a slot past a sequence's end repeats its last token).
    scatter: [L] int64, padded slot of each packed token.
    sequences: S.
    """

    gather: Tensor
    scatter: Tensor
    sequences: int

    @classmethod
    def of(cls, lengths: list[int], device: torch.device | str = "cpu") -> "PackedLayout":
        length = torch.tensor(lengths)
        start = length.cumsum(0) - length
        column = torch.arange(int(length.max()))
        gather = start[:, None] + torch.minimum(column, length[:, None] - 1)
        scatter = torch.nonzero((column < length[:, None]).flatten()).squeeze(1)
        return cls(gather.flatten().to(device), scatter.to(device), len(lengths))


def packed_sdpa(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """transformers attention function; query [1, H, L, d], key and value [1, H_kv, L, d] -> [1, L, H, d].

    Anything but a PackedLayout as mask (generation, the vision tower) goes to transformers' SDPA unchanged.
    """
    if not isinstance(attention_mask, PackedLayout):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    layout = attention_mask

    def unpack(packed: Tensor) -> Tensor:
        padded = packed[0].index_select(1, layout.gather)
        return padded.unflatten(1, (layout.sequences, -1)).transpose(0, 1)

    out = F.scaled_dot_product_attention(
        unpack(query), unpack(key), unpack(value), dropout_p=dropout, is_causal=True, scale=scaling,
        enable_gqa=key.shape[1] != query.shape[1],
    )  # fmt: skip
    return out.transpose(1, 2).flatten(0, 1).index_select(0, layout.scatter).unsqueeze(0), None


AttentionInterface.register(NAME, packed_sdpa)
AttentionMaskInterface.register(NAME, sdpa_mask)
