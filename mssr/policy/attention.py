"""Attention over packed sequences without an [L, L] mask, by PyTorch's SDPA or, where it can run, flash-attn.

S packed sequences lie end to end in one row of L tokens. A block-diagonal mask would cost L^2. flash-attn takes the ends of
the sequences instead and computes only the L tokens. For SDPA each call pads the row to [S, longest], runs causal SDPA and
packs the result. Right padding needs no mask: a causal query never looks right, and the outputs of padded queries are
dropped. So the cost is S * longest^2, and the fused causal kernels of CPU and GPU apply.

The layout reaches the attention function as a keyword of the backbone's call, which the layers of every family pass on
(also the vision tower's, where it is ignored). The 4-dimensional mask beside it stops transformers from building one; it
is empty, so that a layer that does not get the layout fails instead of attending across sequences.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mssr.errors import UserError, shortened

# A name with "flash" in it would make transformers look for its own kernel.
SDPA, FLASH = "mssr_packed_sdpa", "mssr_packed_varlen"


@dataclass(frozen=True, eq=False)
class PackedLayout:
    """Where the tokens of each packed sequence are.

    gather: [S * longest] int64, packed position of each padded slot (padding repeats the sequence's last token).
    scatter: [L] int64, padded slot of each packed token.
    ends: [S + 1] int32, packed position of each sequence's first token, then L.
    longest: tokens of the longest sequence.
    """

    gather: Tensor
    scatter: Tensor
    ends: Tensor
    longest: int

    @classmethod
    def of(cls, lengths: list[int], device: torch.device | str = "cpu") -> "PackedLayout":
        length = torch.tensor(lengths)
        ends = F.pad(length.cumsum(0), (1, 0))
        longest = int(length.max())
        column = torch.arange(longest)
        gather = ends[:-1, None] + torch.minimum(column, length[:, None] - 1)
        scatter = torch.nonzero((column < length[:, None]).flatten()).squeeze(1)
        return cls(gather.flatten().to(device), scatter.to(device), ends.int().to(device), longest)

    @property
    def slots(self) -> int:
        """Number of query positions that SDPA computes, padding included; flash-attn computes L."""
        return len(self.gather)


def packed(layout: PackedLayout) -> dict[str, Any]:
    """Return keywords for a backbone's call, which restrict attention to each packed sequence."""
    return {"attention_mask": torch.empty(1, 1, 0, 0, device=layout.gather.device), "packed_layout": layout}


def attention_name(setting: str, dtype: torch.dtype, device: torch.device) -> str:
    """Return the attn_implementation that `model.attention` (auto, flash or sdpa) stands for.

    dtype, device: of the policy. auto is flash-attn where it can run, else SDPA, which computes the same.

    Raises:
        UserError: flash is set and cannot run.
    """
    if setting == "sdpa":
        return SDPA
    obstacle = _flash_obstacle(dtype, device)
    if obstacle is None:
        return FLASH
    if setting == "flash":
        raise UserError(f"model.attention flash: {obstacle}; set model.attention=auto")
    return SDPA


def _flash_obstacle(dtype: torch.dtype, device: torch.device) -> str | None:
    """Return why flash-attn cannot run, or None."""
    if device.type != "cuda":
        return f"flash-attn runs on a GPU, and the device is {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"flash-attn computes in 16 bits, and model.dtype is {str(dtype).removeprefix('torch.')}"
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: F401
    except ImportError as error:
        return f"flash-attn cannot be imported ({shortened(error, 200)})"
    return None


def _attention_function(attend: Callable[..., Tensor]) -> Callable:
    """Make a transformers attention function: query [1, H, L, d], key and value [1, H_kv, L, d] -> [1, L, H, d].

    attend: computes it for packed sequences. Without a layout (generation) and in the vision tower, which is not causal,
    transformers' own SDPA runs unchanged.
    """

    def attention(
        module, query, key, value, attention_mask, scaling=None, dropout=0.0, packed_layout=None, **kwargs
    ) -> tuple[Tensor, None]:
        if packed_layout is None or not module.is_causal:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
        return attend(query, key, value, packed_layout, scaling, dropout).unsqueeze(0), None

    return attention


@_attention_function
def packed_sdpa(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scaling: float | None, dropout: float
) -> Tensor:
    """[L, H, d] by PyTorch's SDPA."""

    def unpack(packed: Tensor) -> Tensor:
        padded = packed[0].index_select(1, layout.gather)
        return padded.unflatten(1, (-1, layout.longest)).transpose(0, 1)

    out = F.scaled_dot_product_attention(
        unpack(query), unpack(key), unpack(value), dropout_p=dropout, is_causal=True, scale=scaling,
        enable_gqa=key.shape[1] != query.shape[1],
    )  # fmt: skip
    return out.transpose(1, 2).flatten(0, 1).index_select(0, layout.scatter)


@_attention_function
def packed_flash(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scaling: float | None, dropout: float
) -> Tensor:
    """[L, H, d] by flash-attn, in 16 bits on a GPU."""
    from flash_attn import flash_attn_varlen_func

    ends, longest = layout.ends, layout.longest
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))  # [L, heads, d]
    return flash_attn_varlen_func(
        query, key, value, ends, ends, longest, longest, dropout_p=dropout, softmax_scale=scaling, causal=True
    )


for name, function in ((SDPA, packed_sdpa), (FLASH, packed_flash)):
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)
