"""TRL's scoring forward, `model(..., labels=labels, fused_lm_head=True)`, computed by our head.

TRL 1.15 and 1.16 score all tokens there: of the policy, of the policy before its updates and of the frozen reference.
"""

import functools
import types
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl.trainer.utils import FusedCausalLMOutput

from mssr.errors import UserError
from mssr_kernels import FusedLMHead, PolicyLossConfig, PolicyMetrics
from mssr_kernels.logits_path import measure


class PolicyRows:
    """Inputs of a micro-batch's policy loss besides the model, for a loss that the forward pass computes.

    mask        [B, C] bool, True at the tokens of the loss, which are the last C labels
    normalizer  0-d tensor or number that the sum over the tokens is divided by
    tensors     advantage, old_logp, ref_logp, rollout_logp of `mssr_kernels.linear_policy_loss`, [B, C] float32;
                all but the advantage may be None

    Not a dataclass or tuple: FSDP's mixed precision would find the tensors in it and round them to 16 bits.
    """

    def __init__(
        self, mask: Tensor, *, normalizer: Tensor | float, config: PolicyLossConfig, **tensors: Tensor | None
    ) -> None:
        self.mask = mask
        self.tensors = tensors
        self.normalizer = normalizer
        self.config = config


@dataclass
class PolicyLossOutput(FusedCausalLMOutput):
    """TRL's output for a call with `PolicyRows`. Only `loss` carries a gradient.

    ratio, shaped_advantage: [B, labels - 1] float32, as `log_probs`.
    metrics: sums over the micro-batch's tokens.
    """

    ratio: Tensor | None = None
    shaped_advantage: Tensor | None = None
    metrics: PolicyMetrics | None = None


def fuse_head(model: PreTrainedModel, temperature: float) -> None:
    """Replace the scoring forward that TRL gave `model`; all other calls are unchanged.

    The head stays the same module with the same parameters, so saving, generation, weight sync and optimizers see no
    difference. It is called as a module, because DeepSpeed and FSDP gather its weight only then.

    Raises:
        UserError: the model's head is not a plain nn.Linear, or is not all between the backbone and the logits.
    """
    layers = _linear_layers(model)
    settings = _softmax_settings(model, temperature)
    for linear in layers:
        linear.__class__ = FusedLMHead
    trl_forward = model.forward

    @functools.wraps(type(model).forward)  # `generate` checks its arguments against this signature
    def forward(self, *args, fused_lm_head: bool = False, policy_rows: PolicyRows | None = None, **kwargs):
        if not fused_lm_head:
            return trl_forward(*args, **kwargs)
        return _score(self, settings, policy_rows, *args, **kwargs)

    model.forward = types.MethodType(forward, model)


def _score(model, settings, policy_rows, *args, labels: Tensor, **kwargs) -> FusedCausalLMOutput:
    """Score labels, [B, L] int64, -100 for tokens that are not scored, which the head skips."""
    outputs = model.base_model(*args, use_cache=False, **kwargs)
    hidden = outputs.last_hidden_state
    labels = labels.to(hidden.device)  # a model that is split over devices ends on another device
    target = F.pad(labels[:, 1:], (0, 1), value=-100)  # cutting off the last row of `hidden` would copy it
    rows = {}
    if policy_rows is not None:
        target = target.masked_fill(~_place(policy_rows.mask, target), -100)
        given = {name: value for name, value in policy_rows.tensors.items() if value is not None}
        rows = {name: _place(value, target) for name, value in given.items()}
        rows |= {"normalizer": policy_rows.normalizer, "config": policy_rows.config}
    found = model.get_output_embeddings()(hidden, target, **rows, **settings)
    scores = {
        "log_probs": _as_labels(found.logp, target),
        "entropy": _as_labels(found.entropy, target),
        "label_mask": target[:, :-1] != -100,
        "aux_loss": _load_balancing_loss(model.config.get_text_config(), outputs, kwargs),
    }
    if policy_rows is None:
        return FusedCausalLMOutput(**scores)
    ratio, advantage = _as_labels(found.ratio, target), _as_labels(found.advantage, target)
    return PolicyLossOutput(loss=found.loss, ratio=ratio, shaped_advantage=advantage, metrics=found.metrics, **scores)


def _place(value: Tensor, target: Tensor) -> Tensor:
    """Move [B, C] of the last C labels to [B, L], at the positions that predict them."""
    return F.pad(value, (target.shape[1] - value.shape[1] - 1, 1))


def _as_labels(value: Tensor, target: Tensor) -> Tensor:
    """Reshape [B * L] of the positions to [B, L - 1] of all labels but the first, TRL's layout."""
    return value.view(target.shape)[:, :-1]


def _linear_layers(model: PreTrainedModel) -> list[nn.Linear]:
    """Return the head, and PEFT's trained copy of it if there is one (`modules_to_save`)."""
    head = model.get_output_embeddings()
    layers = [] if head is None else [module for module in head.modules() if not list(module.children())]
    for layer in layers or [head]:
        if type(layer) not in (nn.Linear, FusedLMHead):
            raise UserError(
                f"{type(model).__name__}: the head is {type(layer).__name__}, the fused head replaces nn.Linear only; "
                "leave it out of quantization, adapters and FSDP units, or use TRL's own trainer"
            )
    return layers


def _softmax_settings(model: PreTrainedModel, temperature: float) -> dict[str, float | None]:
    """Return temperature and softcap of the head, as the model's own forward shows them.

    TRL reads them from names in the config, which models use differently.
    """
    name, backbone = type(model).__name__, model.base_model
    if backbone is model:
        raise UserError(f"{name}: it has no backbone below its head; use a trainer that scores from the model's logits")
    try:
        scale, softcap = measure(model, backbone, model.get_output_embeddings())
    except ValueError as error:
        raise UserError(
            f"the fused head {error}, and TRL's own would be wrong: use a trainer that scores from the model's logits"
        ) from error
    return {"temperature": temperature / scale, "softcap": softcap}


def _load_balancing_loss(config: PretrainedConfig, outputs, kwargs: dict) -> Tensor | None:
    """Return the auxiliary loss of a mixture of experts, if requested."""
    if not kwargs.get("output_router_logits"):
        return None
    return load_balancing_loss_func(
        outputs.router_logits, config.num_experts, config.num_experts_per_tok, kwargs.get("attention_mask")
    )
