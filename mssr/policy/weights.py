"""The policy's weights by name, unsharded and with LoRA adapters merged, for the sampler and for saved models.

Under ZeRO-3 a rank holds a shard of each parameter, and `parameter.numel()` is 0. Gathering one parameter at a time needs
too many collectives, gathering all at once the memory of the model, so buckets of bounded size are gathered.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mssr.policy.lora import adapted_layers, adapter_parts, merged, own_name
from mssr.policy.model import Policy

BUCKET_BYTES = 512 << 20  # the default: a layer or two of a 7B model, a small part of a device's memory


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of the unsharded parameter."""
    return getattr(parameter, "ds_shape", parameter.shape)


def weight_shapes(policy: Policy) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return shape and dtype of what `named_weights` yields, by name and in its order, without gathering."""
    return {
        name: (whole_shape(weight.parameter), weight.parameter.dtype)
        for weight in _weights(policy)
        for name in weight.names
    }


def untied_names(policy: Policy) -> set[str]:
    """Return every weight's first name, under which it is saved."""
    return {weight.names[0] for weight in _weights(policy)}


def named_weights(policy: Policy, bucket_bytes: int) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight, unsharded and on this rank's device, by its name in the model without adapters.

    In the order of the layers; a tied weight comes under each of its names in turn. Up to ZeRO-2 the tensors are the
    parameters' own values, except that merged adapters are copies. Under ZeRO-3 they are gathered in buckets of at most
    `bucket_bytes` (a larger parameter alone), and each bucket is released before the next; a kept tensor keeps its bucket's
    memory. Then this is a collective, and every rank must consume the whole iterator.
    """
    for bucket in _buckets(policy, bucket_bytes if policy.partitioned else None):
        with gathered([part for weight in bucket for part in weight.parts]):
            for weight in bucket:
                value = weight.value()
                for name in weight.names:
                    yield name, value


@contextmanager
def gathered(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Context in which parameters are unsharded, for reading only. A collective under ZeRO-3, else nothing."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        yield
        return
    import deepspeed  # reads DS_ACCELERATOR when imported, which start_world sets

    with deepspeed.zero.GatheredParameters(parameters):
        yield


@dataclass(frozen=True, eq=False)
class _Weight:
    """names: all names of the parameter. layer: the adapted layer whose weight it is, or None."""

    names: list[str]
    parameter: nn.Parameter
    layer: nn.Module | None

    @property
    def parts(self) -> list[nn.Parameter]:
        """The parameters that `value` needs unsharded."""
        return [self.parameter] if self.layer is None else [self.parameter, *adapter_parts(self.layer)]

    @property
    def nbytes(self) -> int:
        return sum(whole_shape(part).numel() * part.element_size() for part in self.parts)

    @torch.no_grad()
    def value(self) -> Tensor:
        return self.parameter.detach() if self.layer is None else merged(self.parameter, self.layer)


def _buckets(policy: Policy, limit: int | None) -> Iterator[list[_Weight]]:
    """Yield groups of consecutive weights within the limit; None: one group."""
    bucket, filled = [], 0
    for weight in _weights(policy):
        if bucket and limit is not None and filled + weight.nbytes > limit:
            yield bucket
            bucket, filled = [], 0
        bucket.append(weight)
        filled += weight.nbytes
    yield bucket


def _weights(policy: Policy) -> list[_Weight]:
    """Return all weights in the order of the layers."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in policy.model.named_parameters(remove_duplicate=False):
        if (own := own_name(name)) is not None:
            names.setdefault(parameter, []).append(own)
    adapted = {f"{name}.weight": layer for name, layer in adapted_layers(policy).items()}
    return [_Weight(own, parameter, adapted.get(own[0])) for parameter, own in names.items()]
