"""Counts the memory of a computation by running it on the meta device, which allocates nothing."""

import weakref
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryLedger(TorchDispatchMode):
    """Bytes of live tensors that operations in this mode made, and their peak.

    Counts storages, not tensors: views and in-place results are free. Includes the backward pass. Tensors that existed
    before, such as parameters, do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._storages: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        known = {_storage_id(leaf) for leaf in tree_leaves((args, kwargs)) if _counted(leaf)}
        for leaf in tree_leaves(result):
            if _counted(leaf) and _storage_id(leaf) not in known:
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage) -> None:
        key = storage._cdata
        if key in self._storages:
            return
        size = storage.nbytes()
        self._storages[key] = weakref.ref(storage, partial(self._remove, key, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _remove(self, key: int, size: int, _) -> None:
        del self._storages[key]
        self.live -= size


class FusedAttention(TorchFunctionMode):
    """Gives `scaled_dot_product_attention` the memory of the fused kernels on any device: no scores are kept."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            return _Fused.apply(*args[:3])
        return function(*args, **(kwargs or {}))


class _Fused(torch.autograd.Function):
    """query [S, H, L, d], key and value [S, H_kv, L, d] -> [S, H, L, d]; keeps inputs, result and one number per row."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # As in the kernels, the result's heads are adjacent in memory: a view as [S, L, H * d] copies nothing.
        out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        rows = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, rows)
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor):
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _counted(value) -> bool:
    return isinstance(value, Tensor) and value.device.type == "meta"


def _storage_id(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
