"""verl's fused log-probs and entropy, computed by `mssr_kernels`.

With `actor_rollout_ref.model.use_fused_kernels=True` verl's forward computes log-probs and entropy with one of two functions,
selected by `fused_kernel_options.impl_backend`: `FusedLinearForPPO` ("torch", "liger") or `linear_cross_entropy` ("triton",
and Megatron). `install` replaces both; models, shifted labels, packing and sharding stay verl's. To call it in every worker:

    actor_rollout_ref.model.external_lib=mssr.integrations.verl_external_lib
"""

import importlib
import sys

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from mssr.errors import UserError
from mssr.integrations.versions import require_parameters, require_version
from mssr_kernels import linear_logprob_entropy

_FUNCTION_MODULE = "verl.utils.kernel.linear_cross_entropy"
_CLASS_MODULE = "verl.utils.experimental.torch_functional"
# These bind the function on import, perhaps before `install`; the models' forwards import it at each call.
_FUNCTION_IMPORTERS = ("verl.models.mcore.model_forward_fused", "verl.models.mcore.model_forward_1f1b_overlap")

_FUNCTION_PARAMETERS = ["hidden", "weight", "labels", "temperature", "reduction", "dist_process_group"]
_CLASS_PARAMETERS = ["hidden_states", "vocab_weights", "input_ids", "temperature"]


def install() -> str:
    """Make verl's fused forwards call `mssr_kernels`, whatever impl_backend is; return verl's version. May be called again.

    Raises:
        UserError: verl is not installed, its version is not supported, or its functions take other arguments.
    """
    version = require_version("verl")
    try:
        functions, classes = map(importlib.import_module, (_FUNCTION_MODULE, _CLASS_MODULE))
    except ImportError as error:
        raise UserError(f"verl {version} cannot be imported: {error}; install what it needs") from None
    original = classes.FusedLinearForPPO
    if issubclass(original, _Ours):
        return version
    require_parameters(f"verl {version}", functions.LinearCrossEntropy.forward, ["ctx", *_FUNCTION_PARAMETERS])
    require_parameters(f"verl {version}", original.forward, ["self", *_CLASS_PARAMETERS])
    classes.FusedLinearForPPO = type("FusedLinearForPPO", (_Ours, original), {})
    _bind(linear_cross_entropy)
    return version


def uninstall() -> None:
    """Restore verl's own functions."""
    classes = sys.modules.get(_CLASS_MODULE)
    if classes is None or not issubclass(classes.FusedLinearForPPO, _Ours):
        return
    classes.FusedLinearForPPO = classes.FusedLinearForPPO.__bases__[1]
    _bind(sys.modules[_FUNCTION_MODULE].LinearCrossEntropy.apply)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """verl's `linear_cross_entropy`: (log-probs, entropy) of the labels, each [N] float32, N = labels.numel().

    hidden              [..., D]
    weight              [V, D], or this rank's rows of it with a group
    labels              [...] int64, already shifted
    temperature         number > 0
    reduction           "none"
    dist_process_group  None, or the ranks over which the vocabulary is split, as Megatron's tensor parallelism does.
                        Each rank returns its part of hidden's gradient, as verl does; Megatron's sequence parallelism
                        sums them over the group.

    Raises:
        ValueError, TypeError: arguments of wrong shapes or types, or a sharded weight.
    """
    if str(reduction).lower() != "none":
        raise ValueError(f"linear_cross_entropy got reduction {reduction!r}: only 'none', as verl's forwards have it")
    if dist_process_group is not None and dist.get_world_size(dist_process_group) == 1:
        dist_process_group = None
    if dist_process_group is not None:
        hidden = _ShareOfGradient.apply(hidden, dist.get_world_size(dist_process_group))
    return _logp_entropy(hidden, weight, labels, temperature, dist_process_group)


class _Ours:
    """Mixin before verl's own `FusedLinearForPPO`: the same construction, another forward."""

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """(log-probs, entropy) of the shifted input_ids, in their shape; both float32, where verl's entropy has 16 bits."""
        logp, entropy = _logp_entropy(hidden_states, vocab_weights, input_ids, temperature)
        return logp.view(input_ids.shape), entropy.view(input_ids.shape)


class _ShareOfGradient(torch.autograd.Function):
    """Identity with a gradient divided by the number of ranks that will sum it.

    Our gradient is already summed over the group; verl's kernel returns the part of the rank's own columns.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.ranks, None


def _logp_entropy(hidden, weight, labels, temperature, group=None) -> tuple[Tensor, Tensor]:
    if isinstance(weight, DTensor):
        raise ValueError(
            "lm_head.weight is a DTensor, this rank's part of the head: verl's fused forwards read it outside of FSDP2's "
            "hooks; set strategy=fsdp for actor and ref, or use_fused_kernels=False"
        )
    # Megatron has the sequence before the batch, verl packs a batch of one: hidden [S, 1, D] and labels [1, S].
    if [size for size in labels.shape if size != 1] != [size for size in hidden.shape[:-1] if size != 1]:
        raise ValueError(
            f"hidden is {list(hidden.shape)} but the labels are {list(labels.shape)}: they need hidden's leading shape"
        )
    found = linear_logprob_entropy(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels.reshape(-1).to(torch.int64),
        temperature=temperature,
        group=group,
    )
    return found.logp, found.entropy


def _bind(function) -> None:
    for name in (_FUNCTION_MODULE, *_FUNCTION_IMPORTERS):
        if name in sys.modules:
            sys.modules[name].linear_cross_entropy = function
