"""The policy's weights, whole and by name, for whoever needs them outside the model: the sampler, a saved file.

Under ZeRO-3 a rank holds a share of each parameter, and `parameter.numel()` is 0. Gathering parameter by parameter costs a
collective each, gathering everything at once costs the whole model: buckets of bounded size are between the two.

Adapters (LoRA) are merged on the way out, so that nobody else need know of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mssr.policy.lora import adapted_layers, adapter_parts, merged, own_name
from mssr.policy.model import Policy

BUCKET_BYTES = 512 << 20  # where there is no reason for another: a layer or two of a 7B, a small part of a device


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """[...], of all ranks' shares together."""
    return getattr(parameter, "ds_shape", parameter.shape)


def weight_shapes(policy: Policy) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of what `named_weights` gives, by name, in its order; nothing is gathered."""
    return {
        name: (whole_shape(weight.parameter), weight.parameter.dtype)
        for weight in _weights(policy)
        for name in weight.names
    }


def untied_names(policy: Policy) -> set[str]:
    """Every weight's first name, the one it is saved under."""
    return {weight.names[0] for weight in _weights(policy)}


def named_weights(policy: Policy, bucket_bytes: int) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the model under its name in the state dict of the model without adapters, whole, on this rank's device.

    In the layers' order; a tied weight under each of its names, one after the other. Up to ZeRO-2 these are the
    parameters' own values, no copies; a weight with an adapter is one, merged when its turn comes. Under ZeRO-3 they are
    gathered in buckets of at most `bucket_bytes` (a larger parameter alone), each let go of before the next; a tensor that
    is kept keeps its bucket's memory. That makes it a collective: every rank must go through all of them.
    """
    for bucket in _buckets(policy, bucket_bytes if policy.partitioned else None):
        with gathered([part for weight in bucket for part in weight.parts]):
            for weight in bucket:
                value = weight.value()
                for name in weight.names:
                    yield name, value


@contextmanager
def gathered(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Parameters are whole in here, to be read only. A collective where ZeRO-3 holds them, else nothing."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        yield
        return
    import deepspeed  # reads DS_ACCELERATOR when imported, which start_world sets

    with deepspeed.zero.GatheredParameters(parameters):
        yield


@dataclass(frozen=True, eq=False)
class _Weight:
    """names: all of the parameter's. layer: the adapted layer that the parameter is the weight of, else None."""

    names: list[str]
    parameter: nn.Parameter
    layer: nn.Module | None

    @property
    def parts(self) -> list[nn.Parameter]:
        """What must be whole for `value`."""
        return [self.parameter] if self.layer is None else [self.parameter, *adapter_parts(self.layer)]

    @property
    def nbytes(self) -> int:
        return sum(whole_shape(part).numel() * part.element_size() for part in self.parts)

    @torch.no_grad()
    def value(self) -> Tensor:
        return self.parameter.detach() if self.layer is None else merged(self.parameter, self.layer)


def _buckets(policy: Policy, limit: int | None) -> Iterator[list[_Weight]]:
    """Neighbours whose bytes together keep to the limit."""
    bucket, filled = [], 0
    for weight in _weights(policy):
        if bucket and limit is not None and filled + weight.nbytes > limit:
            yield bucket
            bucket, filled = [], 0
        bucket.append(weight)
        filled += weight.nbytes
    yield bucket


def _weights(policy: Policy) -> list[_Weight]:
    """In the layers' order."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in policy.model.named_parameters(remove_duplicate=False):
        if (own := own_name(name)) is not None:
            names.setdefault(parameter, []).append(own)
    adapted = {f"{name}.weight": layer for name, layer in adapted_layers(policy).items()}
    return [_Weight(own, parameter, adapted.get(own[0])) for parameter, own in names.items()]
