"""Validation of the arguments, before any work: one line that says what, where and what to do.

Nothing here waits for a GPU. What only the data can tell (an out-of-range target) is checked eagerly on the CPU and
by `torch._assert_async` on CUDA, which stops the stream and surfaces at the next synchronisation.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class HeadInputs(NamedTuple):
    """The head and the tokens it scores, validated."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    target: Tensor  # [N] int64
    temperature: Tensor | float  # [N] or a number
    softcap: float | None
    ignore_index: int
    workspace_bytes: int

    @property
    def compute_dtype(self) -> torch.dtype:
        """Statistics and accumulators: float32, or float64 when the inputs are (for oracles)."""
        return compute_dtype(self.hidden)


class RowInputs(NamedTuple):
    """What the loss of a row depends on besides its logits, each [N] (or absent), validated and detached."""

    advantage: Tensor
    old_logp: Tensor | None
    ref_logp: Tensor | None
    rollout_logp: Tensor | None
    shaping_entropy: Tensor | None

    def take(self, rows: Tensor, dtype: torch.dtype) -> "RowInputs":
        return RowInputs(*(None if field is None else field[rows].to(dtype) for field in self))


def compute_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def head_inputs(hidden, weight, target, bias, temperature, softcap, ignore_index, workspace_bytes) -> HeadInputs:
    """Check the arguments common to both public functions."""
    _tensor("hidden", hidden, ndim=2, shape="[N, D]")
    _tensor("weight", weight, ndim=2, shape="[V, D]")
    if hidden.dtype not in DTYPES:
        raise TypeError(f"hidden must be float32, bfloat16, float16 or float64, got {_name(hidden.dtype)}")
    if weight.dtype != hidden.dtype:
        raise TypeError(
            f"hidden is {_name(hidden.dtype)} but weight is {_name(weight.dtype)}: cast one, or use autocast"
        )
    if weight.shape[0] == 0:
        raise ValueError(
            "weight is empty (V = 0): under ZeRO-3 or FSDP call the head as a module, so that it is gathered"
        )
    if weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"hidden is [N, {hidden.shape[1]}] but weight is [V, {weight.shape[1]}]: D must agree")
    rows, vocab = hidden.shape[0], weight.shape[0]
    _same_device("weight", weight, hidden)
    if bias is not None:
        _tensor("bias", bias, ndim=1, shape="[V]")
        _same_device("bias", bias, hidden)
        if bias.shape[0] != vocab:
            raise ValueError(f"bias has {bias.shape[0]} entries but weight has V = {vocab} rows")
        if bias.dtype != weight.dtype:
            raise TypeError(f"weight is {_name(weight.dtype)} but bias is {_name(bias.dtype)}: cast one")

    _tensor("target", target, ndim=1, shape="[N]")
    _same_device("target", target, hidden)
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64, got {_name(target.dtype)}: pass target.long()")
    if target.shape[0] != rows:
        raise ValueError(f"target has {target.shape[0]} rows but hidden has {rows}")
    wrong = ((target < 0) | (target >= vocab)) & (target != ignore_index)
    _check_rows(wrong, "target", target, f"outside [0, {vocab}) and not ignore_index ({ignore_index})", IndexError)

    if isinstance(temperature, Tensor):
        temperature = _row_tensor("temperature", temperature, hidden)
        wrong = ~((temperature > 0) & temperature.isfinite()) & (target != ignore_index)
        _check_rows(wrong, "temperature", temperature, "not a finite number > 0", ValueError)
    elif not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a finite number > 0 or a [N] tensor, got {temperature!r}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be a finite number > 0, or None, got {softcap!r}")
    if not workspace_bytes > 0:
        raise ValueError(f"workspace_bytes must be > 0, got {workspace_bytes!r}")
    return HeadInputs(hidden, weight, bias, target, temperature, softcap, ignore_index, int(workspace_bytes))


def row_inputs(head: HeadInputs, config, advantage, old_logp, ref_logp, rollout_logp, shaping_entropy) -> RowInputs:
    """Check the per-row arguments of the policy loss against the head's and against the configuration."""
    rows = RowInputs(
        _row_tensor("advantage", advantage, head.hidden),
        *(
            None if value is None else _row_tensor(name, value, head.hidden)
            for name, value in (
                ("old_logp", old_logp),
                ("ref_logp", ref_logp),
                ("rollout_logp", rollout_logp),
                ("shaping_entropy", shaping_entropy),
            )
        ),
    )
    if config.kl_coef > 0 and ref_logp is None:
        raise ValueError(
            f"config.kl_coef is {config.kl_coef} but ref_logp is missing: pass ref_logp or set kl_coef to 0"
        )
    if config.tis_cap is not None and (old_logp is None or rollout_logp is None):
        missing = "old_logp" if old_logp is None else "rollout_logp"
        raise ValueError(f"config.tis_cap is {config.tis_cap} but {missing} is missing: pass it or set tis_cap to None")
    return rows


def check_normalizer(normalizer):
    if isinstance(normalizer, Tensor):
        if normalizer.ndim != 0:
            raise ValueError(f"normalizer must be a number or a 0-d tensor, got shape {list(normalizer.shape)}")
    elif normalizer is not None and not 0 < normalizer < math.inf:
        raise ValueError(f"normalizer must be a finite number > 0, a 0-d tensor or None, got {normalizer!r}")


def _tensor(name: str, value, ndim: int, shape: str):
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor {shape}, got {type(value).__name__}")
    if value.ndim != ndim:
        raise ValueError(f"{name} must be {shape}, got shape {list(value.shape)}")


def _row_tensor(name: str, value, hidden: Tensor) -> Tensor:
    _tensor(name, value, ndim=1, shape="[N]")
    _same_device(name, value, hidden)
    if value.shape[0] != hidden.shape[0]:
        raise ValueError(f"{name} has {value.shape[0]} rows but hidden has {hidden.shape[0]}")
    # 16-bit log-probs would carry an error of several per cent into exp(logp - old_logp).
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32, got {_name(value.dtype)}: compute it in float32")
    return value.detach()


def _same_device(name: str, value: Tensor, hidden: Tensor):
    if value.device != hidden.device:
        raise ValueError(f"hidden is on {hidden.device} but {name} is on {value.device}: move one")


def _check_rows(wrong: Tensor, name: str, value: Tensor, rule: str, error: type[Exception]):
    if wrong.device.type != "cpu":
        torch._assert_async(~wrong.any(), f"{name} holds a row that is {rule}")
    elif wrong.any():
        row = int(wrong.nonzero()[0])
        raise error(f"{name}[{row}] is {value[row].item()}: {rule}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
