"""Give a transformers model the fused head: `model(**inputs, target=target)` returns log-probs instead of logits.

    patch(model)
    out = model(**inputs, target=next_token_target(input_ids, mask))          # LogprobEntropy, each [B, T]
    out = model(**inputs, target=target, advantage=advantage, old_logp=old)   # PolicyLoss
    unpatch(model)

`logits_path` measures what the model does between its backbone and its logits (soft cap, scale); what the fused head cannot
compute raises an error.
"""

import functools
import inspect
from dataclasses import dataclass
from types import MethodType

import torch
from torch import Tensor, nn

from .config import LogprobEntropy, PolicyLoss
from .core.checks import DTYPES
from .head import FusedLMHead
from .logits_path import measure
from .loss import linear_policy_loss

_HEAD_OWNS = ("hidden", "weight", "target", "bias", "softcap", "group")
_HEAD_ARGUMENTS = tuple(name for name in inspect.signature(linear_policy_loss).parameters if name not in _HEAD_OWNS)
_LOGPROB_ARGUMENTS = ("temperature", "ignore_index", "backend", "workspace_bytes")
# What transformers passes on without naming it: lengths of packed sequences, and the backbone's return type.
_PASSED_ON = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "is_causal", "return_dict")
_NOT_WITH_TARGET = {
    "labels": "use target instead, see next_token_target",
    "logits_to_keep": "there are no logits; set target to -100 where nothing is to be computed",
    "output_hidden_states": "hidden states are not returned; call without target for them",
    "output_attentions": "attentions are not returned; call without target for them",
    "output_router_logits": "the router's loss would be lost; compute it in a call without target, or switch it off",
    "num_items_in_batch": "pass it as normalizer: the tokens of all micro-batches and ranks, over the number of ranks",
    "softcap": "the model's own is used",
    "bias": "the head's own is used",
    "group": "the head is not split over ranks",
}


def patch(model: nn.Module) -> nn.Module:
    """Add the arguments of the fused head to `model`'s forward, in place; return `model`.

    model: any transformers model with a backbone (`base_model_prefix`) and an nn.Linear as output embeddings, or a
    PeftModel around one. Patch before anything wraps its modules or its forward: DDP, fully_shard, deepspeed.initialize,
    accelerator.prepare, torch.compile. Patching again (after its head was resized) measures the model again.

    With target ([B, T] int64, aligned with positions, -100 where nothing is to be computed; see `next_token_target`):

        model(**inputs, target=target)                        LogprobEntropy; also temperature, backend, workspace_bytes
        model(**inputs, target=target, advantage=advantage)   PolicyLoss; also all other arguments of `linear_policy_loss`

    Per-row arguments and results are [B, T] float32. Positions without target are never multiplied with the head. No cache is
    kept unless use_cache is passed. A keyword that neither the head nor the model names raises, where transformers would
    ignore it. Without target, forward is the model's own; parameters, their names and ties, generate, save_pretrained and
    the signature do not change. A deep copy is a patched model of its own; a pickled model comes back unpatched. Model and
    forward refer to each other: call `unpatch`, or gc.collect() after the last reference, to free the memory at once.

    With FSDP2 mixed precision pass MixedPrecisionPolicy(cast_forward_inputs=False) for the model and the head, so that
    per-row arguments stay float32.

    Raises:
        TypeError: there is no backbone, or the head is not a plain nn.Linear (quantised, wrapped by LoRA, sharded).
        ValueError: forward does something between the backbone and the logits that the fused head cannot compute.
    """
    given, model = model, _unwrapped(model)
    if _path_of(model) is not None:
        unpatch(model)
    name = type(model).__name__
    head, backbone = _head_of(model), _backbone_of(model)
    for module, what in ((model, name), (head, f"the output embeddings of {name}")):
        if _is_wrapped(module):
            raise TypeError(f"patch: the forward of {what} is wrapped already: patch first, then wrap or dispatch")
    try:
        scale, softcap = measure(model, backbone, head)
    except ValueError as error:
        raise ValueError(f"patch {error}: it is not supported, use FusedLMHead in a forward of your own") from error
    stock = type(model).forward
    path = _Path(
        next(path for path, module in model.named_modules() if module is head), type(head), scale, softcap,
        forward_names=_parameter_names(stock), backbone_names=_backbone_names(type(backbone).forward),
    )  # fmt: skip

    def forward(self, *args, target: Tensor | None = None, **kwargs):
        if target is None:
            path.refuse_without_target(kwargs)
            return stock(self, *args, **kwargs)
        return path.score(self, path.by_name(args, kwargs), target)

    # generate and trainers read the signature. No __wrapped__: accelerate's unwrap_model would skip this function.
    forward.__signature__, forward.__doc__ = inspect.signature(stock), stock.__doc__
    forward.mssr_path = path
    head.__class__ = FusedLMHead
    # A bound method and not a closure over the model: deepcopy binds it to the copy.
    model.forward = MethodType(forward, model)
    return given


def unpatch(model: nn.Module) -> nn.Module:
    """Undo `patch`, in place; return `model`. Raises ValueError for a model that is not patched."""
    given, model = model, _unwrapped(model)
    path = _path_of(model)
    if path is None:
        raise ValueError(f"unpatch: {type(model).__name__} is not patched, or its forward was wrapped since")
    head = path.head_in(model)
    # A resized head is a new nn.Linear, and stays one.
    if isinstance(head, FusedLMHead):
        if type(head) is not FusedLMHead:
            raise ValueError(f"unpatch: {path.head} is now {type(head).__name__}: unpatch before the model is sharded")
        head.__class__ = path.head_class
    del model.forward
    return given


def next_token_target(tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the target of each position, the token after it; -100 at the last one.

    tokens   [..., T] int64: input_ids, or labels with -100 where there is none
    mask     None, or [..., T]: nonzero where the *token* counts (a response mask, an attention mask)

    Per-row arguments of the loss belong to the predicting position, too: advantage, old_logp and so on of response token t
    go at t - 1.
    """
    if mask is not None:
        if mask.shape != tokens.shape:
            raise ValueError(f"mask is {list(mask.shape)} but tokens are {list(tokens.shape)}: shapes must agree")
        tokens = tokens.masked_fill(~mask.bool(), -100)
    return torch.cat([tokens[..., 1:], torch.full_like(tokens[..., :1], -100)], dim=-1)


@torch.no_grad()
def check_patch(model: nn.Module, **inputs) -> float:
    """Return the largest difference between log-probs of a patched model and those of its own logits, in nats.

    inputs: arguments of forward, with input_ids; a few tokens, because the logits of all of them are computed, in eval mode.
    Call on all ranks where the model is sharded. Raises RuntimeError where the difference is more than rounding explains:
    four times the precision of the logits times their size (the model rounds them to its dtype, the fused head does not).
    """
    target = next_token_target(inputs["input_ids"], inputs.get("attention_mask"))
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        logits, scored = model(**inputs).logits, model(**inputs, target=target)
    finally:
        for module in training:
            module.training = True
    if not isinstance(scored, LogprobEntropy):
        raise RuntimeError(f"check_patch: {type(model).__name__} is not patched")
    kept = target != -100
    logp = torch.log_softmax(logits[kept].float(), dim=-1).gather(1, target[kept][:, None])[:, 0]
    difference = float((logp - scored.logp[kept]).abs().max())
    rounding = 1e-4 + 4 * torch.finfo(logits.dtype).eps * float(logits[kept].abs().max())
    if not difference <= rounding:
        raise RuntimeError(
            f"check_patch: log-probs of {type(model).__name__} are {difference:.2g} off those of its logits, where rounding "
            f"explains {rounding:.2g}: patch it again if its config changed, else it is not supported"
        )
    return difference


@dataclass(frozen=True)
class _Path:
    """How to get from a model's inputs to log-probs."""

    head: str  # the head's name in the model
    head_class: type[nn.Linear]  # of the head before `patch`
    scale: float  # logits = scale * softcap(head(hidden))
    softcap: float | None
    forward_names: tuple[str, ...]  # parameters of the model's own forward
    backbone_names: tuple[str, ...]

    def head_in(self, model: nn.Module) -> nn.Module:
        return functools.reduce(getattr, self.head.split("."), model)

    def by_name(self, args: tuple, kwargs: dict) -> dict:
        positional = dict(zip(self.forward_names, args, strict=False))
        twice = next((name for name in positional if name in kwargs), None)
        if twice is not None or len(args) > len(self.forward_names):
            also = f", and {twice} by name as well" if twice else ""
            raise TypeError(f"forward got {len(args)} positional arguments{also}")
        return positional | kwargs

    def refuse_without_target(self, kwargs: dict) -> None:
        """Raise for arguments of the head, which transformers would ignore (its own loss takes ignore_index)."""
        for name in _HEAD_ARGUMENTS:
            if name in kwargs and name not in (*self.forward_names, "ignore_index"):
                raise ValueError(f"{name} is given but no target: pass target, or leave {name} out for logits")

    def score(self, model: nn.Module, kwargs: dict, target: Tensor) -> LogprobEntropy | PolicyLoss:
        """Return what the head returns for the hidden states of the backbone, in target's shape."""
        arguments = {name: kwargs.pop(name) for name in _HEAD_ARGUMENTS if name in kwargs}
        self._check(model, arguments, kwargs)
        if "use_cache" in self.backbone_names and kwargs.get("use_cache") is None:
            kwargs["use_cache"] = False
        hidden = _backbone_of(model)(**{name: value for name, value in kwargs.items() if value is not None})[0]
        if self.scale != 1:
            arguments["temperature"] = arguments.get("temperature", 1.0) / self.scale
        result = self.head_in(model)(hidden, target, softcap=self.softcap, **arguments)
        rows = (field.reshape(target.shape) if isinstance(field, Tensor) and field.ndim else field for field in result)
        return type(result)(*rows)

    def _check(self, model: nn.Module, arguments: dict, kwargs: dict) -> None:
        head, name = self.head_in(model), type(model).__name__
        copies = () if isinstance(head, FusedLMHead) else dict(getattr(head, "modules_to_save", {})).values()
        if not isinstance(head, FusedLMHead) and not (copies and all(isinstance(c, FusedLMHead) for c in copies)):
            raise TypeError(
                f"{self.head} of {name} is now {_full_name(head)}, which cannot take target: patch the model again "
                "after resizing its head, and leave the head out of LoRA's target_modules (modules_to_save is fine)"
            )
        for given, reason in _NOT_WITH_TARGET.items():
            value = kwargs.get(given)
            if isinstance(value, Tensor) or value:
                raise ValueError(f"{given} cannot be given with target: {reason}")
            kwargs.pop(given, None)
        configs = (model.config, getattr(model.config, "text_config", None))
        if any(getattr(config, "output_router_logits", False) for config in configs):
            raise ValueError(
                f"config.output_router_logits of {name} is on, and with target the router's loss would be lost: set it to "
                "False, or train without target"
            )
        for given, value in arguments.items():
            if given not in _LOGPROB_ARGUMENTS and given != "advantage" and arguments.get("advantage") is None:
                raise ValueError(f"{given} is given but no advantage: it belongs to the policy loss")
            if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16):
                raise TypeError(
                    f"{given} must be float32, got {str(value.dtype).removeprefix('torch.')}: if mixed precision casts the "
                    "inputs of forward, switch that off (FSDP2: MixedPrecisionPolicy(cast_forward_inputs=False))"
                )
        for given, value in kwargs.items():
            if value is None or given in self.backbone_names or given in _PASSED_ON:
                continue
            if given in self.forward_names:
                raise ValueError(
                    f"{given} is used by the forward of {name} itself, which a call with target skips: leave it out"
                )
            raise TypeError(
                f"{given} is an argument neither of the head nor of {name}, which would ignore it: leave it out, or correct "
                f"its name (of the head: {', '.join(_HEAD_ARGUMENTS)})"
            )


def _unwrapped(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _path_of(model: nn.Module) -> _Path | None:
    return getattr(getattr(vars(model).get("forward"), "__func__", None), "mssr_path", None)


def _is_wrapped(module: nn.Module) -> bool:
    """Return whether the instance has its own forward; that of an unpickled patched model is its class's."""
    own = vars(module).get("forward")
    return own is not None and getattr(own, "__func__", None) is not type(module).forward


def _backbone_of(model: nn.Module) -> nn.Module:
    return getattr(model, model.base_model_prefix)


def _head_of(model: nn.Module) -> nn.Linear:
    """Return the head. Raises TypeError for a model that `patch` does not support."""
    name, prefix = type(model).__name__, getattr(model, "base_model_prefix", None)
    if prefix is None:
        raise TypeError(
            f"patch needs a transformers model with a backbone, got {name}: pass the model itself, before DDP, DeepSpeed or "
            "torch.compile wraps it"
        )
    head = model.get_output_embeddings()
    if head is None:
        raise TypeError(
            f"patch: {name} has no output embeddings: pass a language model with its head (of a composite model, that part)"
        )
    if not isinstance(getattr(model, prefix or "", None), nn.Module):
        raise TypeError(
            f"patch: {name} has no backbone {prefix!r} (its base_model_prefix) below its head: it is not supported, use "
            "FusedLMHead in a forward of your own"
        )
    if type(head) in (nn.Linear, FusedLMHead) and type(head.weight.data) is Tensor and head.weight.dtype in DTYPES:
        return head
    raise TypeError(
        f"patch needs an nn.Linear as output embeddings of {name}, got {_full_name(head)}: {_way_out(head)}"
    )


def _way_out(head: nn.Module) -> str:
    """Return what to do about output embeddings that are not a plain nn.Linear."""
    if hasattr(head, "modules_to_save"):
        return (
            "patch the model first, and pass it to get_peft_model (modules_to_save may then name the head) after that"
        )
    if hasattr(head, "base_layer"):
        return "it is wrapped by an adapter, leave the head out of LoRA's target_modules"
    if type(head) in (nn.Linear, FusedLMHead) and type(head.weight.data) is not Tensor:
        return f"its weight is a {_full_name(head.weight.data)}, patch before the model is sharded or quantised"
    if type(head) in (nn.Linear, FusedLMHead):
        return f"its weight is {str(head.weight.dtype).removeprefix('torch.')}, leave the head out of quantisation"
    return "leave the head out of quantisation, and patch before the model is sharded"


def _full_name(value: object) -> str:
    """Return the name of the class; with its module where nn has a class of the same name (that of LoRA is Linear, too)."""
    kind = type(value)
    return (
        f"{kind.__module__}.{kind.__name__}" if hasattr(nn, kind.__name__) and kind is not nn.Linear else kind.__name__
    )


def _parameter_names(function) -> tuple[str, ...]:
    _, *parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD or p.kind is p.KEYWORD_ONLY)


def _backbone_names(forward) -> tuple[str, ...]:
    """Return the parameter names, with use_cache if the backbone passes it on unnamed (Qwen3-VL, LLaVA)."""
    names = _parameter_names(forward)
    passes_on = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(forward).parameters.values())
    hidden = passes_on and "past_key_values" in names and "use_cache" not in names
    return (*names, "use_cache") if hidden else names
