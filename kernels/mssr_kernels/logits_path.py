"""Measure what a model does between its backbone and its logits: a soft cap, a scale, or something unknown.

The model's own forward runs once with probes in place of its backbone and its head, so nothing is looked up by family: soft
cap and scale are found however the code writes them (Gemma, Cohere, Granite, Falcon-H1, MiniCPM3). Anything else is a
ValueError, and so are tensors that the forward makes for its backbone (positions, embeddings), which a call with target
would skip.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# Logits in place of the head's: the slope at 0 gives the scale, the last one shows a cap, the others verify both.
_PROBE = (2.0**-20, 1.0, -1.0, 8.0, -8.0, 64.0, -64.0, 2.0**20)
_EXACT = 1e-5  # relative; float32 computations agree to 1e-7


class _OnlyHidden(tuple):
    """Output of a backbone: (hidden,), and None for any other attribute."""

    def __getattr__(self, name: str):
        if name.startswith("_"):  # DeepSpeed's hooks rebuild a tuple with `_fields` as a named one
            raise AttributeError(name)
        return self[0] if name == "last_hidden_state" else None


def measure(model: nn.Module, backbone: nn.Module, head: nn.Linear) -> tuple[float, float | None]:
    """Return (scale, softcap) such that the model's logits are scale * softcap(head(hidden)).

    The model's own forward runs between a backbone that returns powers of two and a head that returns `_PROBE`. Only weights
    between the two are read, so it works on meta tensors and empty shards. Float64 keeps every step exact; a factor applied
    before the head counts as one on the logits. Raises ValueError for a model that computes anything else.
    """
    device = head.weight.device if head.weight.device.type != "meta" else torch.device("cpu")
    probe = torch.tensor(_PROBE, dtype=torch.float64, device=device)
    rows, width = len(_PROBE), head.in_features
    # Values differ within and between rows, so that a normalisation is not taken for a factor.
    pattern = torch.arange(rows * width, device=device).reshape(rows, width) % 5
    hidden = 2.0 ** (pattern + torch.arange(rows, device=device)[:, None]).double()[None]
    factors = []

    def probe_head(given: Tensor) -> Tensor:
        if given.shape != hidden.shape:
            raise ValueError(f"the head is called with {list(given.shape)} for hidden states {list(hidden.shape)}")
        factor = given / hidden
        uniform = bool((factor == factor[0, 0, 0]).all()) and not given.requires_grad
        rounded = given.dtype in (torch.bfloat16, torch.float16) or head.bias is not None
        if not uniform or (rounded and factor[0, 0, 0] != 1):
            raise ValueError("hidden states are changed before the head")
        factors.append(factor[0, 0, 0])
        return factors[0] * probe[None, :, None].expand(1, rows, head.out_features)

    tokens = torch.zeros(1, rows, dtype=torch.int64, device=device)

    def probe_backbone(*args, **kwargs) -> _OnlyHidden:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if len(tensors) != 1 or tensors[0] is not tokens:
            raise ValueError("the backbone is called with other tensors than forward")
        return _OnlyHidden((hidden,))

    try:
        with _forward_of(backbone, probe_backbone), _forward_of(head, probe_head), torch.enable_grad():
            out = type(model).forward(model, input_ids=tokens)
        logits = out[0] if isinstance(out, tuple) else out.logits
        if len(factors) != 1:
            raise ValueError(f"the head is called {len(factors)} times")
        return _fit(logits, probe, head.out_features)
    except Exception as error:
        raise ValueError(
            f"cannot follow {type(model).__name__} from its backbone to its logits ({_first_line(error)})"
        ) from error


def _fit(logits: Tensor, probe: Tensor, columns: int) -> tuple[float, float | None]:
    """Return the scale and cap that turn each probe into the logits, in all columns. ValueError where there are none."""
    if logits.requires_grad:
        raise ValueError("parameters are applied to the logits")
    if logits.shape != (1, len(probe), columns):
        raise ValueError(f"logits are {list(logits.shape)} where the head returned {[1, len(probe), columns]}")
    found = logits[0].double()
    scale, most = _as_written(float(found[0, 0] / probe[0])), float(found[-1, 0])
    if not 0 < scale < math.inf or not 0 < most < math.inf:
        raise ValueError("logits are changed after the head")
    softcap = None if most > 0.999 * scale * float(probe[-1]) else _as_written(most / scale)
    expected = scale * (probe if softcap is None else softcap * torch.tanh(probe / softcap))
    if not torch.allclose(found, expected[:, None].expand_as(found), rtol=_EXACT, atol=0):
        raise ValueError("logits are changed after the head, and not by a scale or a soft cap")
    return scale, softcap


def _as_written(value: float) -> float:
    """Return the short decimal that the value was written as: 0.1 for 0.1 rounded to float32."""
    short = float(f"{value:.5g}")
    return short if math.isclose(short, value, rel_tol=2e-7) else value


def _first_line(error: Exception) -> str:
    line = next(iter(str(error).splitlines()), type(error).__name__)
    return line if isinstance(error, ValueError) else f"it does not run on probes: {line}"


@contextmanager
def _forward_of(module: nn.Module, forward) -> Iterator[None]:
    """Replace the module's forward, and restore it: its class's, or an attribute of the instance."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
