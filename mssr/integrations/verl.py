"""verl's fused log-probs and entropy, computed by `mssr_kernels`.

With `actor_rollout_ref.model.use_fused_kernels=True` verl gives the model a forward that asks one of two functions for the
log-probs and the entropy, as `fused_kernel_options.impl_backend` says: `FusedLinearForPPO` ("torch", "liger") or
`linear_cross_entropy` ("triton", and Megatron). `install` puts ours in the place of both; models, shifted labels, packing
and sharding stay verl's. In every worker, from verl's own switch:

    actor_rollout_ref.model.external_lib=mssr.integrations.verl_external_lib
"""

import importlib
import inspect
import sys

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from mssr.errors import UserError
from mssr.integrations.versions import require_version
from mssr_kernels import linear_logprob_entropy

_FUNCTION_MODULE = "verl.utils.kernel.linear_cross_entropy"
_CLASS_MODULE = "verl.utils.experimental.torch_functional"
# They bind the function when they are imported, which may be before `install`. The models' forwards import it at each call.
_FUNCTION_IMPORTERS = ("verl.models.mcore.model_forward_fused", "verl.models.mcore.model_forward_1f1b_overlap")

_FUNCTION_PARAMETERS = ["hidden", "weight", "labels", "temperature", "reduction", "dist_process_group"]
_CLASS_PARAMETERS = ["hidden_states", "vocab_weights", "input_ids", "temperature"]


def install() -> str:
    """From here on verl's fused forwards call `mssr_kernels`, whatever impl_backend is. Again: nothing changes.

    Returns verl's version.

    Raises:
        UserError: verl is not installed, not of a supported version, or its functions take other arguments.
    """
    version = require_version("verl")
    try:
        functions, classes = map(importlib.import_module, (_FUNCTION_MODULE, _CLASS_MODULE))
    except ImportError as error:
        raise UserError(f"verl {version} cannot be imported: {error}; install what it needs") from None
    original = classes.FusedLinearForPPO
    if issubclass(original, _Ours):
        return version
    _require_parameters(functions.LinearCrossEntropy.forward, ["ctx", *_FUNCTION_PARAMETERS], version)
    _require_parameters(original.forward, ["self", *_CLASS_PARAMETERS], version)
    classes.FusedLinearForPPO = type("FusedLinearForPPO", (_Ours, original), {})
    _bind(linear_cross_entropy)
    return version


def uninstall() -> None:
    """Gives verl its own functions back; nothing happens where they never left."""
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
                        The gradient by hidden is handed back as verl does it: summed over the group it is the whole one,
                        which Megatron's sequence parallelism does.

    Raises:
        ValueError, TypeError: arguments that do not fit, or a weight that is sharded.
    """
    if str(reduction).lower() != "none":
        raise ValueError(f"linear_cross_entropy got reduction {reduction!r}: only 'none', as verl's forwards have it")
    if dist_process_group is not None and dist.get_world_size(dist_process_group) == 1:
        dist_process_group = None
    if dist_process_group is not None:
        hidden = _ShareOfGradient.apply(hidden, dist.get_world_size(dist_process_group))
    return _logp_entropy(hidden, weight, labels, temperature, dist_process_group)


class _Ours:
    """What `install` puts before verl's own `FusedLinearForPPO`: the same construction, another forward."""

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """(log-probs, entropy) of input_ids (already shifted), of its shape; both float32, verl's entropy is in 16 bits."""
        logp, entropy = _logp_entropy(hidden_states, vocab_weights, input_ids, temperature)
        return logp.view(input_ids.shape), entropy.view(input_ids.shape)


class _ShareOfGradient(torch.autograd.Function):
    """Identity, whose gradient is divided by the number of ranks that will sum it up again.

    Ours arrives summed over the group; verl's kernel leaves every rank with the part of its own columns.
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


def _require_parameters(function, expected: list[str], version: str) -> None:
    found = list(inspect.signature(function).parameters)
    if found != expected:
        raise UserError(
            f"verl {version}: {function.__qualname__} takes ({', '.join(found)}), not ({', '.join(expected)}): "
            "this version is not supported, see docs/INTEGRATIONS.md"
        )
