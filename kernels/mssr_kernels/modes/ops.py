"""The computations as operators of PyTorch's dispatcher: `torch.compile` sees one node for each, and no graph break.

The dispatcher takes tensors and plain values only. `call_*` spread `HeadInputs`, `RowInputs` and `PolicyLossConfig` into
tensors and named options, and the operators put them together again: everything goes by name, as the schemas below say.

The gradients of the policy loss are outputs of the forward pass; the backward formula scales them and hands them out.
"""

import dataclasses

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _resolve_process_group

from ..backends.base import Backend
from ..backends.choice import backend_named
from ..config import LogprobEntropy, PolicyLoss, PolicyLossConfig, PolicyMetrics
from ..core.checks import check_values
from ..core.inputs import HeadInputs, RowInputs, compute_dtype
from ..core.statistics import RowStatistics, UpstreamGradient
from ..core.vocab_parallel import Shard
from . import loss_in_forward, recompute

HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? row_temperature"
OPTIONS = "float temperature, float? softcap, int ignore_index, int workspace_bytes, str backend, str? group"
ROWS = "Tensor advantage, Tensor? old_logp, Tensor? ref_logp, Tensor? rollout_logp, Tensor? shaping_entropy"
LOSS = "float? normalizer_value, float vocab_drop_tol, bool[] wanted"  # wanted: gradients of hidden, weight, bias
CONFIG = (
    "float clip_low, float clip_high, float? dual_clip, float entropy_alpha, float entropy_kappa, str entropy_source, "
    "float kl_coef, str kl_estimator, float entropy_coef, float? tis_cap, float log_ratio_cap"
)


def call_logprob_entropy(head: HeadInputs, backend: str, group: ProcessGroup | None) -> LogprobEntropy:
    _refuse_transforms("linear_logprob_entropy", head)
    tensors, options = _spread(head, backend, group)
    logp, entropy, lse, _, _ = logprob_entropy_op(*tensors, **options)
    return LogprobEntropy(logp, entropy, lse)


def call_policy_loss(
    head: HeadInputs, rows: RowInputs, normalizer: Tensor | float | None, config: PolicyLossConfig, vocab_drop_tol: float,
    backend: str, group: ProcessGroup | None,
) -> PolicyLoss:  # fmt: skip
    _refuse_transforms("linear_policy_loss", head)
    tensors, options = _spread(head, backend, group)
    if torch.compiler.is_compiling() and normalizer is not None and not isinstance(normalizer, Tensor):
        normalizer = _as_tensor(normalizer, head)
    is_tensor, grad = isinstance(normalizer, Tensor), torch.is_grad_enabled()
    loss, logp, entropy, advantage, ratio, clipped, metrics, *_ = policy_loss_op(
        *tensors,
        normalizer.detach() if is_tensor else None,
        *(None if field is None else field.detach() for field in rows),
        normalizer_value=None if is_tensor or normalizer is None else float(normalizer), vocab_drop_tol=vocab_drop_tol,
        wanted=[grad and t is not None and t.requires_grad for t in (head.hidden, head.weight, head.bias)],
        **options, **{name: getattr(config, name) for name in _CONFIG_NAMES},
    )  # fmt: skip
    return PolicyLoss(loss, logp, entropy, advantage, ratio, clipped, PolicyMetrics(*metrics.unbind()))


_CONFIG_NAMES = tuple(field.name for field in dataclasses.fields(PolicyLossConfig))


def _spread(head: HeadInputs, backend: str, group: ProcessGroup | None) -> tuple[tuple, dict]:
    """The tensors of HEAD and the OPTIONS."""
    temperature = head.temperature
    if torch.compiler.is_compiling() and not isinstance(temperature, Tensor):
        temperature = _as_tensor(temperature, head)
    per_row = isinstance(temperature, Tensor)
    row_temperature = temperature.detach() if per_row else None
    return (head.hidden, head.weight, head.bias, head.target, row_temperature), dict(
        temperature=1.0 if per_row else float(temperature),
        softcap=None if head.softcap is None else float(head.softcap),
        ignore_index=head.ignore_index, workspace_bytes=int(head.workspace_bytes),
        backend=backend, group=None if group is None else group.group_name,
    )  # fmt: skip


def _as_tensor(number: float, head: HeadInputs) -> Tensor:
    """Return the number as a 0-d tensor, for a compiler: every value of a number in an operator's arguments is a new graph.

    A product, and not torch.full, because the compiler keeps numbers symbolic in arithmetic with tensors only.
    """
    return head.hidden.new_ones((), dtype=head.compute_dtype) * number


def _gather(
    hidden, weight, bias, target, row_temperature, *, temperature, backend, group, **options
) -> tuple[HeadInputs, Backend]:
    """The inverse of `_spread`."""
    temperature = temperature if row_temperature is None else row_temperature
    if row_temperature is not None and row_temperature.dim() == 0:  # a number, by `_as_tensor`
        # On a CPU it is a number again, so that 1 costs no pass over the logits. On a GPU that would be a synchronisation.
        on_cpu = row_temperature.device.type == "cpu"
        temperature = row_temperature.item() if on_cpu else row_temperature.expand(target.shape).contiguous()
    shard = None if group is None else Shard.of(weight, _resolve_process_group(group))
    hidden, weight, bias = (None if tensor is None else tensor.detach() for tensor in (hidden, weight, bias))
    head = HeadInputs(hidden, weight, bias, target, temperature=temperature, shard=shard, **options)
    return head, backend_named(backend)


def logprob_entropy(*tensors: Tensor | None, **options) -> tuple[Tensor, ...]:
    """Return logp, entropy, lse, and the maximum and log sum that the backward pass needs, each [N]."""
    head, backend = _gather(*tensors, **options)
    check_values(head)
    with torch.autocast(head.hidden.device.type, enabled=False):
        rows = head.kept_rows()
        found = backend.statistics(head, rows)

    def scatter(value: Tensor) -> Tensor:
        return value.new_zeros(len(head.target)).index_copy_(0, rows, value)

    return tuple(map(scatter, (found.logp, found.entropy, found.lse, found.max, found.log_sum)))


def logprob_entropy_backward(
    d_logp: Tensor | None, d_entropy: Tensor | None, d_lse: Tensor | None, statistics: list[Tensor],
    *tensors: Tensor | None, wanted: list[bool], **options,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the gradients of hidden, weight and bias; [0] where not wanted."""
    head, backend = _gather(*tensors, **options)
    upstream = UpstreamGradient(d_logp, d_entropy, d_lse)
    with torch.autocast(head.hidden.device.type, enabled=False):
        found = recompute.gradients(head, RowStatistics(*statistics), upstream, wanted, backend)
    return tuple(head.hidden.new_empty(0) if gradient is None else gradient for gradient in found)


def policy_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, row_temperature: Tensor | None,
    normalizer: Tensor | None, *rows: Tensor | None,
    normalizer_value: float | None, vocab_drop_tol: float, wanted: list[bool], **options,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return loss, logp, entropy, advantage, ratio, clipped, metrics [fields], the gradients of hidden, weight and bias
    ([0] where not wanted) times a divisor, and this divisor (0-d)."""
    config = PolicyLossConfig(**{name: options.pop(name) for name in _CONFIG_NAMES})
    head, backend = _gather(hidden, weight, bias, target, row_temperature, **options)
    check_values(head)
    normalizer = normalizer_value if normalizer is None else normalizer
    with torch.autocast(hidden.device.type, enabled=False):
        result, (*gradients, divisor) = loss_in_forward.linear_policy_loss(
            head, RowInputs(*rows), normalizer, config, vocab_drop_tol, wanted, backend
        )
    unwanted = hidden.new_empty(0, dtype=head.compute_dtype)
    gradients = (unwanted.clone() if gradient is None else gradient for gradient in gradients)
    return *result[:-1], torch.stack(result.metrics), *gradients, divisor.clone()


def _operator(function, arguments: str, results: int):
    schema = f"({arguments}) -> ({', '.join(['Tensor'] * results)})"
    return torch.library.custom_op(f"mssr_kernels::{function.__name__}", function, mutates_args=(), schema=schema)


logprob_entropy_op = _operator(logprob_entropy, f"{HEAD}, *, {OPTIONS}", 5)
logprob_entropy_backward_op = _operator(
    logprob_entropy_backward,
    f"Tensor? d_logp, Tensor? d_entropy, Tensor? d_lse, Tensor[] statistics, {HEAD}, *, bool[] wanted, {OPTIONS}",
    3,
)
policy_loss_op = _operator(policy_loss, f"{HEAD}, Tensor? normalizer, {ROWS}, *, {LOSS}, {OPTIONS}, {CONFIG}", 11)


@logprob_entropy_op.register_fake
def _(hidden, weight, bias, target, *_, **__):
    return tuple(hidden.new_empty(target.shape[0], dtype=compute_dtype(hidden)) for _ in range(5))


@logprob_entropy_backward_op.register_fake
def _(d_logp, d_entropy, d_lse, statistics, hidden, weight, bias, *_, wanted, **__):
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if want else hidden.new_empty(0)
        for tensor, want in zip((hidden, weight, bias), wanted)
    )


@policy_loss_op.register_fake
def _(hidden, weight, bias, target, *_, wanted, **__):
    dtype = compute_dtype(hidden)
    logp, entropy, advantage, ratio = (hidden.new_empty(target.shape[0], dtype=dtype) for _ in range(4))
    clipped = hidden.new_empty(target.shape[0], dtype=torch.bool)
    metrics = hidden.new_empty(len(PolicyMetrics._fields), dtype=dtype)
    gradients = [
        hidden.new_empty(tensor.shape if want else 0, dtype=dtype)
        for tensor, want in zip((hidden, weight, bias), wanted)
    ]
    loss, divisor = (hidden.new_empty((), dtype=dtype) for _ in range(2))
    return loss, logp, entropy, advantage, ratio, clipped, metrics, *gradients, divisor


def _save_for_recomputation(ctx, inputs, keyword_only_inputs, output):
    logp, entropy, _, maximum, log_sum = output
    ctx.save_for_backward(maximum, log_sum, logp, entropy, *inputs)
    ctx.options = keyword_only_inputs
    ctx.mark_non_differentiable(maximum, log_sum)
    ctx.set_materialize_grads(False)


def _recompute(ctx, d_logp, d_entropy, d_lse, *_):
    _refuse_double_backward("linear_logprob_entropy")
    maximum, log_sum, logp, entropy, *tensors = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])  # hidden, weight, bias: the first in HEAD
    gradients, upstream, statistics = [None] * 3, (d_logp, d_entropy, d_lse), [maximum, log_sum, logp, entropy]
    if not all(gradient is None for gradient in upstream):
        gradients = logprob_entropy_backward_op(*upstream, statistics, *tensors, wanted=wanted, **ctx.options)
    return *(g if want else None for g, want in zip(gradients, wanted)), *[None] * (len(tensors) - 3)


def _save_gradients(ctx, inputs, keyword_only_inputs, output):
    _, *others = output
    *_, d_hidden, d_weight, d_bias, divisor = others
    ctx.save_for_backward(d_hidden, d_weight, d_bias, divisor)
    ctx.dtype, ctx.tensors, ctx.handed_out = inputs[0].dtype, len(inputs), False
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
    wanted = ctx.needs_input_grad[:3]  # hidden, weight, bias: the first in HEAD
    return *(g.to(ctx.dtype) if want else None for g, want in zip(scaled, wanted)), *[None] * (ctx.tensors - 3)


logprob_entropy_op.register_autograd(_recompute, setup_context=_save_for_recomputation)
policy_loss_op.register_autograd(_hand_out, setup_context=_save_gradients)


def _refuse_transforms(name: str, head: HeadInputs):
    """Raise for what an operator's autograd formula does not know: it would return a tangent of 0, or fail inside torch."""
    transforms, levels = torch._C._functorch, []
    if torch._C._are_functorch_transforms_active():  # torch's own autograd.Function asks there, too
        # A compiler can trace only the look-up of the innermost transform.
        one = torch.compiler.is_compiling()
        levels = [transforms.peek_interpreter_stack()] if one else transforms.get_interpreter_stack()
    if any(level.key() == transforms.TransformType.Grad for level in levels):
        raise RuntimeError(
            f"{name} does not support torch.func.grad, vjp and jacrev: use loss.backward() or torch.autograd.grad, or "
            "backend='reference'"
        )
    leaves = (head.hidden, head.weight, head.bias)
    if any(leaf is not None and forward_ad.unpack_dual(leaf).tangent is not None for leaf in leaves):
        raise RuntimeError(
            f"{name} has no forward-mode derivative (torch.func.jvp, jacfwd, forward_ad): use backend='reference'"
        )


def _refuse_double_backward(name: str):
    # A compiler traces the backward pass with gradients enabled, and refuses double backward itself.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{name} has no double backward: drop create_graph=True, or use backend='reference'")
