"""The policy's weights, whole and by name, for whoever needs them outside the model: the sampler, a saved file.

Under ZeRO-3 a rank holds a share of each parameter, and `parameter.numel()` is 0. Gathering parameter by parameter costs a
collective each, gathering everything at once costs the whole model: buckets of bounded size are between the two.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mssr.policy.model import Policy

BUCKET_BYTES = 512 << 20  # where there is no reason for another: a layer or two of a 7B, a small part of a device


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """[...], of all ranks' shares together."""
    return getattr(parameter, "ds_shape", parameter.shape)


def weight_shapes(policy: Policy) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of what `named_weights` gives, by name, in its order; nothing is gathered."""
    return {
        name: (whole_shape(parameter), parameter.dtype) for parameter, names in _names(policy).items() for name in names
    }


def named_weights(policy: Policy, bucket_bytes: int) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the model under its name in `policy.model`'s state dict, whole, on this rank's device.

    In the layers' order; a tied weight under each of its names, one after the other. Up to ZeRO-2 these are the
    parameters' own values, no copies. Under ZeRO-3 they are gathered in buckets of at most `bucket_bytes` (a larger
    parameter alone), each let go of before the next; a tensor that is kept keeps its bucket's memory. That makes it
    a collective: every rank must go through all of them.
    """
    for bucket in _buckets(policy, bucket_bytes if policy.partitioned else None):
        with gathered([parameter for _, parameter in bucket]):
            for names, parameter in bucket:
                for name in names:
                    yield name, parameter.detach()


@contextmanager
def gathered(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Parameters are whole in here, to be read only. A collective where ZeRO-3 holds them, else nothing."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        yield
        return
    import deepspeed  # reads DS_ACCELERATOR when imported, which start_world sets

    with deepspeed.zero.GatheredParameters(parameters):
        yield


def _buckets(policy: Policy, limit: int | None) -> Iterator[list[tuple[list[str], nn.Parameter]]]:
    """(names, parameter) of neighbours whose bytes together keep to the limit."""
    bucket, filled = [], 0
    for parameter, own_names in _names(policy).items():
        size = whole_shape(parameter).numel() * parameter.element_size()
        if bucket and limit is not None and filled + size > limit:
            yield bucket
            bucket, filled = [], 0
        bucket.append((own_names, parameter))
        filled += size
    yield bucket


def _names(policy: Policy) -> dict[nn.Parameter, list[str]]:
    """Every parameter's names, in the layers' order."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in policy.model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return names
