"""The public functions: what their arguments mean, and the choice of a backend."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import reference
from .backends.choice import resolve
from .config import LogprobEntropy, PolicyLoss, PolicyLossConfig
from .core.checks import check_head, check_loss, check_values
from .core.inputs import WORKSPACE_BYTES, HeadInputs, RowInputs
from .modes import ops


def linear_logprob_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    backend: str = "auto",
    workspace_bytes: int = WORKSPACE_BYTES,
    group: ProcessGroup | None = None,
) -> LogprobEntropy:
    """Return log-prob of `target` and entropy of softmax(softcap(hidden weight^T + bias) / temperature), without logits.

    hidden            [N, D] float32, bfloat16 or float16; any strides. Flatten leading dimensions first.
    weight            [V, D], dtype and device of hidden
    target            [N] int64
    bias              [V], dtype of hidden; -inf masks a column
    temperature       number > 0, or [N] float32 (it gets no gradient)
    softcap           None, or cap: x -> cap * tanh(x / cap), before the temperature
    ignore_index      rows with this target give zeros and no gradient, whatever they hold (NaN included)
    backend           "auto" ("triton" for large 16-bit heads on CUDA, else "chunked"), "triton", "chunked" or "reference";
                      `explain` tells which one runs and what it costs
    workspace_bytes   limit on the memory for logits and scratch; a smaller one is slower, not less exact
    group             None, or a process group whose ranks split the vocabulary: weight and bias are this rank's rows of
                      the head, contiguous and in rank order. All else, upstream gradients included, is equal on all ranks,
                      and so are the results; the gradient of hidden arrives summed over the ranks.

    Returns LogprobEntropy(logp, entropy, lse), each [N] float32. Gradients flow from all three to hidden, weight and bias
    where these require them. Double backward, forward-mode derivatives and the transforms of torch.func (grad, jvp, ...)
    raise; backend "reference" has them all. Under torch.compile N, the temperature and the normalizer may change between
    calls; every other number or setting compiles a new graph.

    Statistics are computed in float32 from float32 accumulators, whatever the dtype of the inputs. Float64 inputs (for
    oracles) are computed and returned in float64. Under autocast, hidden, weight and bias are cast as in nn.Linear.

    A NaN in a row that is not ignored makes that row's outputs NaN, and the gradients it reaches. Raises TypeError or
    ValueError for arguments that do not fit, and IndexError for a target outside [0, V) that is not ignore_index. On CUDA
    the latter is a device-side assertion, because a check on the host would wait for the device.
    """
    head = _head(hidden, weight, bias, target, temperature, softcap, ignore_index, workspace_bytes)
    backend = _resolve(backend, head, group)
    if backend == "reference":
        return _in_reference(reference.linear_logprob_entropy, head)
    return ops.call_logprob_entropy(head, backend, group)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    advantage: Tensor,
    old_logp: Tensor | None = None,
    *,
    ref_logp: Tensor | None = None,
    rollout_logp: Tensor | None = None,
    shaping_entropy: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    config: PolicyLossConfig = PolicyLossConfig(),
    bias: Tensor | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    backend: str = "auto",
    workspace_bytes: int = WORKSPACE_BYTES,
    vocab_drop_tol: float | None = None,
    group: ProcessGroup | None = None,
) -> PolicyLoss:
    """Return the entropy-shaped, clipped policy loss of MSSR (arXiv 2512.18215), fused with the language-model head.

    Per row, with logp and the entropy H of the current policy (`linear_logprob_entropy`):

        A'   = A + min(alpha * H, |A| / kappa)                  H detached (arXiv 2506.14758)
        r    = exp(logp - old_logp)
        obj  = min(r A', clip(r, 1 - clip_low, 1 + clip_high) A')
        obj  = max(obj, dual_clip * A')                         where A' < 0
        w    = min(exp(old_logp - rollout_logp), tis_cap)       1 without tis_cap
        loss = -obj w + kl_coef (e^d - d - 1) - entropy_coef H,   d = ref_logp - logp

    with logp - old_logp and d clamped to +-config.log_ratio_cap, summed over the rows not ignored and divided by
    `normalizer`. `PolicyLossConfig.ppo()` is the clipped objective alone.
    Arguments not described here are those of `linear_logprob_entropy`.

    advantage         [N] float32, as are all of the following; none of them gets a gradient
    old_logp          log-probs of the policy that the ratio is taken against; None: on-policy, the ratio is exactly 1
    ref_logp          log-probs of the reference policy; required if config.kl_coef > 0, else used for the metric only
    rollout_logp      log-probs of the sampler; required, with old_logp, if config.tis_cap is set
    shaping_entropy   H of the shaping. None: by config.entropy_source, the current policy's entropy ("exact"), or -p log p
                      of the first of rollout_logp, old_logp and logp that is there ("sampled_token")
    normalizer        number > 0 or 0-d tensor, used as it is: for a token mean over micro-batches and ranks. None: the
                      number of rows not ignored; with no such row, loss and gradients are 0
    vocab_drop_tol    None or 0: exact gradients. Above 0, vocabulary columns are left out of the backward products as long
                      as no row drops more of its gradient by the logits, in the 1-norm, than
                      vocab_drop_tol * (|dloss/dlogp| + |dloss/dH|). Values stay exact, and the label is always kept.

    Returns PolicyLoss(loss, logp, entropy, advantage, ratio, clipped, metrics); only `loss` (0-d float32) carries
    gradient. Except in "reference", this call also computes the gradients: `loss.backward()` multiplies them by the
    upstream scalar and hands them out, once (a second backward through the same loss raises RuntimeError).

    A NaN in a row that is not ignored makes the loss NaN.
    """
    head = _head(hidden, weight, bias, target, temperature, softcap, ignore_index, workspace_bytes)
    rows = RowInputs(advantage, old_logp, ref_logp, rollout_logp, shaping_entropy)
    check_loss(head.hidden, rows, normalizer, config, vocab_drop_tol)
    backend = _resolve(backend, head, group)
    if backend == "reference":
        return _in_reference(reference.linear_policy_loss, head, **rows._asdict(), normalizer=normalizer, config=config)
    return ops.call_policy_loss(head, rows, normalizer, config, vocab_drop_tol or 0.0, backend, group)


def _head(hidden, weight, bias, target, *options) -> HeadInputs:
    """The checked arguments. Under autocast the operands are cast as in nn.Linear: differentiably, and never float64."""
    if isinstance(hidden, Tensor) and torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = (
            tensor.to(dtype)
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
            else tensor
            for tensor in (hidden, weight, bias)
        )
    head = HeadInputs(hidden, weight, bias, target, *options)
    check_head(head)
    return head


def _resolve(backend: str, head: HeadInputs, group: ProcessGroup | None) -> str:
    weight = head.weight
    vocab, width = weight.shape
    contiguous = weight.stride(1) == 1
    backend = resolve(backend, weight.device, weight.dtype, width, vocab, head.workspace_bytes, contiguous)
    if group is not None and backend == "reference":
        raise ValueError("backend 'reference' has the whole vocabulary on every rank: drop group or change backend")
    return backend


def _in_reference(function: Callable, head: HeadInputs, **loss_arguments) -> LogprobEntropy | PolicyLoss:
    check_values(head)
    head_arguments = {name: value for name, value in head._asdict().items() if name != "shard"}
    with torch.autocast(head.hidden.device.type, enabled=False):
        return function(**head_arguments, **loss_arguments)
