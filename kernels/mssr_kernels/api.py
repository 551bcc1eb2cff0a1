"""The public functions: arguments, their meaning, and the choice of backend."""

import dataclasses

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import ops, reference
from .checks import check_group, check_head, check_normalizer, check_rows, check_tolerance, check_values
from .choice import resolve
from .inputs import HeadInputs, RowInputs
from .types import LogprobEntropy, PolicyLoss, PolicyLossConfig, PolicyMetrics

WORKSPACE_BYTES = 256 << 20


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
    """Log-probability of `target` and entropy of softmax(softcap(hidden weight^T + bias) / temperature), without the logits.

    hidden            [N, D] float32, bfloat16 or float16; any strides. Flatten leading dimensions first.
    weight            [V, D], dtype and device of hidden
    target            [N] int64
    bias              [V], dtype of hidden; -inf masks a column
    temperature       number > 0, or [N] float32 (no gradient flows to it)
    softcap           None, or cap: x -> cap * tanh(x / cap), before the temperature
    ignore_index      rows with this target give zeros and no gradient, whatever they hold (NaN included)
    backend           "auto" (a table: "triton" for 16 bits on CUDA, else "chunked"), "triton", "chunked" or "reference";
                      `explain` tells which, and what it would take
    workspace_bytes   bound on the memory for logits and scratch; a smaller one is slower, not less exact
    group             None, or a process group over whose ranks the vocabulary is split: weight and bias are this rank's
                      rows of the head, contiguous and in rank order; everything else, upstream gradients included, is
                      the same on every rank. So are the results; the gradient by hidden arrives summed over the ranks.

    Returns LogprobEntropy(logp, entropy, lse), each [N] float32. Gradient flows from all three to hidden, weight and bias,
    where they require it; not twice (double backward raises).

    Statistics are computed in float32 from float32 accumulators whatever the dtype of the inputs. Float64 inputs (for
    oracles) are computed and returned in float64. Under autocast hidden, weight and bias are cast as by nn.Linear.

    A NaN in a row that is not ignored makes that row's outputs NaN, and the gradients it reaches. Raises TypeError or
    ValueError for arguments that do not fit, IndexError for a target outside [0, V) that is not ignore_index; on CUDA
    that one is a device-side assertion, because looking would wait for the device.
    """
    hidden, weight, bias = _autocast(hidden, weight, bias)
    check_head(hidden, weight, target, bias, temperature, softcap, workspace_bytes)
    backend = _resolve(backend, weight, workspace_bytes)
    check_group(group, backend)
    if backend == "reference":
        check_values(
            HeadInputs(hidden, weight, bias, target, temperature, softcap, ignore_index, workspace_bytes, None)
        )
        with torch.autocast(hidden.device.type, enabled=False):
            return reference.linear_logprob_entropy(
                hidden, weight, target, bias=bias, temperature=temperature, softcap=softcap, ignore_index=ignore_index
            )
    head = _flat_head(hidden, weight, bias, target, temperature, softcap, ignore_index, workspace_bytes, backend, group)
    return LogprobEntropy(*ops.logprob_entropy_op(*head)[:3])


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
    """The entropy-shaped, clipped policy loss of MSSR (arXiv 2512.18215) fused with the language-model head.

    Row by row, with logp and the entropy H of the current policy (`linear_logprob_entropy`):

        A'   = A + min(alpha * H, |A| / kappa)                  H detached (arXiv 2506.14758)
        r    = exp(logp - old_logp)
        obj  = min(r A', clip(r, 1 - clip_low, 1 + clip_high) A')
        obj  = max(obj, dual_clip * A')                         where A' < 0
        w    = min(exp(old_logp - rollout_logp), tis_cap)       1 without tis_cap
        loss = -obj w + kl_coef (e^d - d - 1) - entropy_coef H,   d = ref_logp - logp

    summed over the rows not ignored and divided by `normalizer`. What is not described here is as there.

    advantage         [N] float32, as are all of the following; none of them receives a gradient
    old_logp          the policy that the ratio is taken against; None: on-policy, the ratio is exactly 1
    ref_logp          the reference policy; needed where config.kl_coef > 0, else only the metric is computed
    rollout_logp      the sampler's; needed, with old_logp, where config.tis_cap is set
    shaping_entropy   H of the shaping; None: as config.entropy_source says, the current policy's own by default, or for
                      "sampled_token" -p log p from rollout_logp, else old_logp, else the current policy
    normalizer        number > 0 or 0-d tensor, for a token mean over micro-batches and ranks, used as it is; None: the
                      number of rows not ignored, or 1 where there are none: then the loss is 0 and so are the gradients
    vocab_drop_tol    None or 0: exact. Above 0, columns of the vocabulary are left out of the backward products as long as
                      each row drops no more of its gradient by the logits, in the 1-norm, than
                      vocab_drop_tol * (|dloss/dlogp| + |dloss/dH|). Values are exact all the same; the label is always kept.

    Returns PolicyLoss(loss, logp, entropy, advantage, ratio, clipped, metrics); only `loss` (0-d float32) carries
    gradient. But in the reference, the gradients are formed by this very call: `loss.backward()` multiplies them
    by the upstream scalar and hands them out, once (a second backward through the same loss raises RuntimeError).

    A NaN in a row that is not ignored makes the loss NaN.
    """
    hidden, weight, bias = _autocast(hidden, weight, bias)
    check_head(hidden, weight, target, bias, temperature, softcap, workspace_bytes)
    rows = RowInputs(advantage, old_logp, ref_logp, rollout_logp, shaping_entropy)
    check_rows(hidden, config, rows)
    check_normalizer(normalizer)
    check_tolerance(vocab_drop_tol)
    backend = _resolve(backend, weight, workspace_bytes)
    check_group(group, backend)
    if backend == "reference":
        check_values(
            HeadInputs(hidden, weight, bias, target, temperature, softcap, ignore_index, workspace_bytes, None)
        )
        with torch.autocast(hidden.device.type, enabled=False):
            return reference.linear_policy_loss(
                hidden,
                weight,
                target,
                advantage,
                old_logp,
                ref_logp=ref_logp,
                rollout_logp=rollout_logp,
                shaping_entropy=shaping_entropy,
                normalizer=normalizer,
                config=config,
                bias=bias,
                temperature=temperature,
                softcap=softcap,
                ignore_index=ignore_index,
            )
    grad = torch.is_grad_enabled()
    loss, *fields, metrics, _, _, _, _ = ops.policy_loss_op(
        *_flat_head(hidden, weight, bias, target, temperature, softcap, ignore_index, workspace_bytes, backend, group),
        *(None if field is None else field.detach() for field in rows),
        normalizer.detach() if isinstance(normalizer, Tensor) else None,
        float(normalizer) if isinstance(normalizer, int | float) else None,
        vocab_drop_tol or 0.0,
        [grad and tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)],
        *(getattr(config, field.name) for field in dataclasses.fields(config)),
    )
    return PolicyLoss(loss, *fields, PolicyMetrics(*metrics.unbind()))


def _resolve(backend: str, weight: Tensor, workspace_bytes: int) -> str:
    vocab, width = weight.shape
    return resolve(backend, weight.device, weight.dtype, width, vocab, workspace_bytes, weight.stride(1) == 1)


def _flat_head(hidden, weight, bias, target, temperature, softcap, ignore_index, workspace_bytes, backend, group):
    """The arguments of the operators: tensors and plain numbers, no objects."""
    per_row = isinstance(temperature, Tensor)
    return (
        hidden,
        weight,
        bias,
        target,
        temperature.detach() if per_row else None,
        1.0 if per_row else float(temperature),
        None if softcap is None else float(softcap),
        ignore_index,
        int(workspace_bytes),
        backend,
        None if group is None else group.group_name,
    )


def _autocast(hidden, weight, bias):
    """Cast as autocast casts the operands of nn.Linear: differentiably, and float64 not at all."""
    if not isinstance(hidden, Tensor) or not torch.is_autocast_enabled(hidden.device.type):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(hidden.device.type)
    return tuple(
        tensor.to(dtype)
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
        else tensor
        for tensor in (hidden, weight, bias)
    )
