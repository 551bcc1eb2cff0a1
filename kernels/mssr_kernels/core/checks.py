"""Validation of the arguments, before any work. An error is one line: what is wrong, where, and what to do.

All but `check_values` look at types, shapes and options only, so that a compiler can trace them. `check_values` looks at the
data (a target out of range): at once on the CPU, and by `torch._assert_async` on CUDA, which does not wait for the device
but stops the stream, and surfaces at the next synchronisation.
"""

import math

import torch
from torch import Tensor

from ..config import PolicyLossConfig
from .inputs import HeadInputs, RowInputs

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_head(head: HeadInputs):
    """Check the arguments that both public functions take, by type and shape."""
    hidden, weight, bias, target, temperature, softcap, _, workspace_bytes, _ = head
    _tensor("hidden", hidden, ndim=2, shape="[N, D]")
    _tensor("weight", weight, ndim=2, shape="[V, D]")
    if hidden.dtype not in DTYPES:
        raise TypeError(f"hidden must be float32, bfloat16, float16 or float64, got {_name(hidden.dtype)}")
    if weight.dtype != hidden.dtype:
        raise TypeError(f"hidden is {_name(hidden.dtype)} but weight is {_name(weight.dtype)}: cast one, or autocast")
    if weight.shape[0] == 0:
        raise ValueError("weight is empty (V = 0): under ZeRO-3 or FSDP call the head as a module, which gathers it")
    if weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"hidden is [N, {hidden.shape[1]}] but weight is [V, {weight.shape[1]}]: D must agree")
    _same_device("weight", weight, hidden)
    if bias is not None:
        _tensor("bias", bias, ndim=1, shape="[V]")
        _same_device("bias", bias, hidden)
        if bias.shape[0] != weight.shape[0]:
            raise ValueError(f"bias has {bias.shape[0]} entries but weight has V = {weight.shape[0]} rows")
        if bias.dtype != weight.dtype:
            raise TypeError(f"weight is {_name(weight.dtype)} but bias is {_name(bias.dtype)}: cast one")

    _tensor("target", target, ndim=1, shape="[N]")
    _same_device("target", target, hidden)
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64, got {_name(target.dtype)}: pass target.long()")
    if target.shape[0] != hidden.shape[0]:
        raise ValueError(f"target has {target.shape[0]} rows but hidden has {hidden.shape[0]}")

    if isinstance(temperature, Tensor):
        _row_tensor("temperature", temperature, hidden)
    elif not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a finite number > 0 or a [N] tensor, got {temperature!r}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be a finite number > 0, or None, got {softcap!r}")
    if not workspace_bytes > 0:
        raise ValueError(f"workspace_bytes must be > 0, got {workspace_bytes!r}")


def check_values(head: HeadInputs):
    """Check targets and temperatures of the rows that are not ignored."""
    target, vocab, kept = head.target, head.total_vocab, head.target != head.ignore_index
    wrong = ((target < 0) | (target >= vocab)) & kept
    _check_rows(wrong, "target", target, f"outside [0, {vocab}) and not ignore_index ({head.ignore_index})", IndexError)
    if isinstance(head.temperature, Tensor):
        wrong = ~((head.temperature > 0) & head.temperature.isfinite()) & kept
        _check_rows(wrong, "temperature", head.temperature, "not a finite number > 0", ValueError)


def check_loss(hidden: Tensor, rows: RowInputs, normalizer, config: PolicyLossConfig, vocab_drop_tol):
    """Check the arguments of the policy loss, and that those which the configuration needs are there."""
    if not isinstance(config, PolicyLossConfig):
        raise TypeError(f"config must be a PolicyLossConfig, got {type(config).__name__}: pass PolicyLossConfig(...)")
    for name, value in zip(RowInputs._fields, rows):
        if value is not None or name == "advantage":
            _row_tensor(name, value, hidden)
    if config.kl_coef > 0 and rows.ref_logp is None:
        raise ValueError(f"config.kl_coef is {config.kl_coef} but ref_logp is missing: pass it or set kl_coef to 0")
    if config.tis_cap is not None and (rows.old_logp is None or rows.rollout_logp is None):
        missing = "old_logp" if rows.old_logp is None else "rollout_logp"
        raise ValueError(f"config.tis_cap is {config.tis_cap} but {missing} is missing: pass it or set tis_cap to None")
    if isinstance(normalizer, Tensor):
        if normalizer.ndim != 0:
            raise ValueError(f"normalizer must be a number or a 0-d tensor, got shape {list(normalizer.shape)}")
    elif normalizer is not None and not 0 < normalizer < math.inf:
        raise ValueError(f"normalizer must be a finite number > 0, a 0-d tensor or None, got {normalizer!r}")
    if vocab_drop_tol is not None and not 0 <= vocab_drop_tol < 1:
        raise ValueError(f"vocab_drop_tol must be a probability in [0, 1) or None, got {vocab_drop_tol!r}")


def _tensor(name: str, value, ndim: int, shape: str):
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor {shape}, got {type(value).__name__}")
    if value.ndim != ndim:
        raise ValueError(f"{name} must be {shape}, got shape {list(value.shape)}")


def _row_tensor(name: str, value, hidden: Tensor):
    _tensor(name, value, ndim=1, shape="[N]")
    _same_device(name, value, hidden)
    if value.shape[0] != hidden.shape[0]:
        raise ValueError(f"{name} has {value.shape[0]} rows but hidden has {hidden.shape[0]}")
    # 16-bit log-probs would carry an error of several per cent into exp(logp - old_logp).
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32, got {_name(value.dtype)}: compute it in float32")


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
