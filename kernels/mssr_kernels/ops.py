"""The computations as operators of PyTorch's dispatcher: `torch.compile` sees one node for each, and no graph break.

An operator takes tensors and plain numbers, so the arguments travel flat; `_head` puts them together again. The policy
loss is an operator whose gradients are outputs of the forward pass; its backward formula scales and hands them out.
"""

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from . import loss_in_forward, recompute
from .checks import check_values
from .choice import backend_named
from .inputs import HeadInputs, RowInputs, compute_dtype
from .statistics import RowStatistics, UpstreamGradient
from .types import PolicyLossConfig
from .vocab_parallel import Shard


def logprob_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    workspace_bytes: int,
    backend: str,
    group: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logp, entropy, lse, and the maximum and log sum that the backward pass wants, each [N]."""
    head = _head(
        hidden, weight, bias, target, row_temperature, temperature, softcap, ignore_index, workspace_bytes, group
    )
    check_values(head)
    with torch.autocast(hidden.device.type, enabled=False):
        rows = head.kept_rows()
        found = backend_named(backend).statistics(head, rows)

    def scatter(value: Tensor) -> Tensor:
        return value.new_zeros(len(target)).index_copy_(0, rows, value)

    return tuple(map(scatter, (found.logp, found.entropy, found.lse, found.max, found.log_sum)))


def logprob_entropy_backward(
    d_logp: Tensor | None,
    d_entropy: Tensor | None,
    d_lse: Tensor | None,
    statistics: list[Tensor],
    wanted: list[bool],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    workspace_bytes: int,
    backend: str,
    group: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by hidden, weight and bias; [0] where not wanted."""
    head = _head(
        hidden, weight, bias, target, row_temperature, temperature, softcap, ignore_index, workspace_bytes, group
    )
    upstream = UpstreamGradient(d_logp, d_entropy, d_lse)
    with torch.autocast(hidden.device.type, enabled=False):
        found = recompute.gradients(head, RowStatistics(*statistics), upstream, wanted, backend_named(backend))
    return tuple(hidden.new_empty(0) if gradient is None else gradient for gradient in found)


def policy_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    workspace_bytes: int,
    backend: str,
    group: str | None,
    advantage: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    rollout_logp: Tensor | None,
    shaping_entropy: Tensor | None,
    normalizer: Tensor | None,
    normalizer_value: float | None,
    vocab_drop_tol: float,
    wanted: list[bool],
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    entropy_alpha: float,
    entropy_kappa: float,
    entropy_source: str,
    kl_coef: float,
    kl_estimator: str,
    entropy_coef: float,
    tis_cap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, logp, entropy, advantage, ratio, clipped, metrics [fields], and the gradients of the loss by hidden, weight and
    bias ([0] where not wanted) times the last output, a 0-d tensor."""
    head = _head(
        hidden, weight, bias, target, row_temperature, temperature, softcap, ignore_index, workspace_bytes, group
    )
    check_values(head)
    config = PolicyLossConfig(
        clip_low, clip_high, dual_clip, entropy_alpha, entropy_kappa, entropy_source, kl_coef, kl_estimator,
        entropy_coef, tis_cap,
    )  # fmt: skip
    rows = RowInputs(advantage, old_logp, ref_logp, rollout_logp, shaping_entropy)
    with torch.autocast(hidden.device.type, enabled=False):
        result, gradients = loss_in_forward.linear_policy_loss(
            head,
            rows,
            normalizer_value if normalizer is None else normalizer,
            config,
            vocab_drop_tol,
            wanted,
            backend_named(backend),
        )
    *gradients, divisor = gradients
    empty = (hidden.new_empty(0, dtype=head.compute_dtype) for _ in gradients)
    return (
        *result[:-1],
        torch.stack(result.metrics),
        *(other if gradient is None else gradient for gradient, other in zip(gradients, empty)),
        divisor.clone(),
    )


logprob_entropy_op = torch.library.custom_op("mssr_kernels::logprob_entropy", logprob_entropy, mutates_args=())
logprob_entropy_backward_op = torch.library.custom_op(
    "mssr_kernels::logprob_entropy_backward", logprob_entropy_backward, mutates_args=()
)
policy_loss_op = torch.library.custom_op("mssr_kernels::policy_loss", policy_loss, mutates_args=())


@logprob_entropy_op.register_fake
def _(hidden, weight, bias, target, *rest):
    return tuple(hidden.new_empty(len(target), dtype=compute_dtype(hidden)) for _ in range(5))


@logprob_entropy_backward_op.register_fake
def _(d_logp, d_entropy, d_lse, statistics, wanted, hidden, weight, bias, *rest):
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if want else hidden.new_empty(0)
        for tensor, want in zip((hidden, weight, bias), wanted)
    )


@policy_loss_op.register_fake
def _(hidden, weight, bias, target, *rest):
    wanted, dtype = rest[15], compute_dtype(hidden)
    rows = [hidden.new_empty(len(target), dtype=dtype) for _ in range(4)]
    clipped = hidden.new_empty(len(target), dtype=torch.bool)
    gradients = [
        hidden.new_empty(tensor.shape if want else 0, dtype=dtype)
        for tensor, want in zip((hidden, weight, bias), wanted)
    ]
    scalar = hidden.new_empty((), dtype=dtype)
    return (scalar, *rows, clipped, hidden.new_empty(10, dtype=dtype), *gradients, torch.empty_like(scalar))


def _save_for_recomputation(ctx, inputs, output):
    hidden, weight, bias, target, row_temperature, *ctx.rest = inputs
    logp, entropy, _, maximum, log_sum = output
    ctx.save_for_backward(hidden, weight, bias, target, row_temperature, maximum, log_sum, logp, entropy)
    ctx.mark_non_differentiable(maximum, log_sum)
    ctx.set_materialize_grads(False)


def _recompute(ctx, d_logp, d_entropy, d_lse, *_):
    _refuse_double_backward("linear_logprob_entropy")
    hidden, weight, bias, target, row_temperature, *statistics = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    gradients = [None] * 3
    if not all(upstream is None for upstream in (d_logp, d_entropy, d_lse)):
        gradients = logprob_entropy_backward_op(
            d_logp, d_entropy, d_lse, statistics, wanted, hidden, weight, bias, target, row_temperature, *ctx.rest
        )
    return *(gradient if want else None for gradient, want in zip(gradients, wanted)), *[None] * 8


def _save_gradients(ctx, inputs, output):
    _, *others = output
    ctx.save_for_backward(*output[-4:])
    ctx.dtype, ctx.handed_out = inputs[0].dtype, False
    ctx.mark_non_differentiable(*others)
    ctx.set_materialize_grads(False)


def _hand_out(ctx, upstream, *_):
    _refuse_double_backward("linear_policy_loss")
    if ctx.handed_out:
        raise RuntimeError(
            "linear_policy_loss: its gradients, formed in the forward pass, were handed out by an earlier backward; "
            "call the function again instead of using retain_graph"
        )
    *gradients, divisor = ctx.saved_tensors
    factor = upstream / divisor
    compiling = torch.compiler.is_compiling()
    ctx.handed_out = not compiling
    # In place, so that autograd can make the very buffers `.grad`. Looking at the factor is free on the CPU only.
    is_one = not compiling and factor.device.type == "cpu" and factor.item() == 1
    scaled = (g if is_one else g * factor if compiling else g.mul_(factor) for g in gradients)
    wanted = ctx.needs_input_grad[:3]
    return *(g.to(ctx.dtype) if want else None for g, want in zip(scaled, wanted)), *[None] * 27


logprob_entropy_op.register_autograd(_recompute, setup_context=_save_for_recomputation)
policy_loss_op.register_autograd(_hand_out, setup_context=_save_gradients)


def _refuse_double_backward(name: str):
    # A compiler traces the backward pass with gradients enabled, and refuses double backward itself.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{name} has no double backward: drop create_graph=True, or use backend='reference'")


def _head(hidden, weight, bias, target, row_temperature, temperature, softcap, ignore_index, workspace_bytes, group):
    return HeadInputs(
        hidden,
        weight,
        bias,
        target,
        temperature if row_temperature is None else row_temperature,
        softcap,
        ignore_index,
        workspace_bytes,
        None if group is None else Shard.of(weight, _resolve_process_group(group)),
    )
