"""Liger's fused linear GRPO loss by these kernels: replace the import, keep the calls.

    from mssr_kernels.liger import LigerFusedLinearGRPOLoss  # was: from liger_kernel.chunked_loss

The names, orders and defaults of the arguments and the results are those of liger-kernel 0.8.1 to 0.8.5 (0.8.0 has no
`num_items_in_batch`, and corrects the divergence by the token's ratio where the level is the sequence). Liger itself is not
needed. Loss types: grpo (arXiv 2402.03300), bnpo, dr_grpo (2503.20783), dapo (2503.14476), cispo (2506.13585), sapo
(2511.20347), luspo, vespo; sequence-level ratios are GSPO's (2507.18071).

What can be written as `linear_policy_loss` is, and has its gradients when the call returns: a clipped objective is linear
in its advantage, so that a weight >= 0 of a row goes into it. What cannot takes its log-probs from
`linear_logprob_entropy` and is a few operations on [B, T] besides.

Where it differs from Liger, on purpose:

- Log-probs are formed from logits in float32. Liger rounds 16-bit logits, and sums dW in the dtype of the weight.
- Rows that the mask leaves out are not computed, whatever they hold (NaN and any token included), nor is the advantage
  of a completion without tokens looked at.
- A token outside of the vocabulary raises IndexError in a row that counts. To Liger its logit is 0.
- A mask other than 0 and 1, and a negative `vllm_is_ratio`, are errors.
- The loss is good for one backward where `linear_policy_loss` made it; a second one raises RuntimeError.
"""

import math
import warnings
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .api import linear_logprob_entropy, linear_policy_loss
from .inputs import compute_dtype
from .types import PolicyLossConfig

_CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
_UNCLIPPED = ("cispo", "sapo", "vespo")  # these have no sequence-level ratio
_LEFT_OUT = torch.iinfo(torch.int64).min  # no token of anybody's, unlike -100


class _Batch(NamedTuple):
    """What the loss of each token depends on besides its log-prob; log-probs are 0 in the rows that do not count."""

    mask: Tensor  # [B, T] 0 or 1
    counted: Tensor  # [B, T] bool: has a loss. The mask, but for luspo
    advantage: Tensor  # [B, 1]
    old_logp: Tensor | None  # [B, T]
    ref_logp: Tensor | None  # [B, T]; None: no divergence
    is_ratio: Tensor | None  # [B, 1] or [B, T], as it was given

    @property
    def lengths(self) -> Tensor:
        return self.mask.sum(1, keepdim=True)


class LigerFusedLinearGRPOLoss(nn.Module):
    """The GRPO family of losses with the language-model head fused in, by the signature of liger-kernel 0.8.5.

    beta                       weight of k3 against the reference: e^d - d - 1, d = ref_logp - logp
    compiled, chunk_size       accepted and without effect: neither changes a result, and memory is bounded anyway
    use_ref_model              the call must bring ref_per_token_logps or ref_input; False: what it brings is not used
    epsilon_low, epsilon_high  the ratio is clipped to [1 - epsilon_low, 1 + epsilon_high]; cispo: to <= epsilon_high
    loss_type                  "grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo" or "vespo"
    max_completion_length      tokens; dr_grpo divides by B * max_completion_length and needs it
    importance_sampling_level  of the ratio: "token", or "sequence" for the clipped loss types
    sapo_temperature_*         slopes of sapo's sigmoid for advantages above zero and for the others
    temperature                of the logits, > 0
    delta                      None, or the most that the unclipped ratio may be; clipped loss types only
    use_bias_correction_kl     weigh the divergence of each token with its ratio, gradient included
    vespo_*                    vespo's weight for advantages of at least zero and for the others

    Raises ValueError for an option that does not exist or does not go with another.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ):
        super().__init__()
        if loss_type not in _CLIPPED + _UNCLIPPED:
            raise ValueError(f"loss_type must be one of {', '.join(_CLIPPED + _UNCLIPPED)}, got {loss_type!r}")
        if importance_sampling_level not in ("token", "sequence"):
            raise ValueError(f"importance_sampling_level is {importance_sampling_level!r}: 'token' or 'sequence'")
        if importance_sampling_level == "sequence" and loss_type in _UNCLIPPED:
            raise ValueError(f"importance_sampling_level must be 'token' for loss_type {loss_type!r}, got 'sequence'")
        if loss_type == "dr_grpo" and not (max_completion_length or 0) > 0:
            raise ValueError(f"loss_type 'dr_grpo' needs max_completion_length > 0, got {max_completion_length!r}")
        if not (sapo_temperature_pos > 0 and sapo_temperature_neg > 0):
            raise ValueError(
                f"sapo_temperature_* must be > 0, got {sapo_temperature_pos!r} and {sapo_temperature_neg!r}"
            )
        if delta is not None and not delta > 0:
            raise ValueError(f"delta must be > 0 or None, got {delta!r}")
        self.beta = beta
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.chunk_size = chunk_size
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_high
        self.loss_type = loss_type
        self.max_completion_length = max_completion_length
        self.importance_sampling_level = importance_sampling_level
        self.sapo_temperature_pos = sapo_temperature_pos
        self.sapo_temperature_neg = sapo_temperature_neg
        self.temperature = temperature
        self.delta = delta
        self.use_bias_correction_kl = use_bias_correction_kl
        self.vespo_k_pos = vespo_k_pos
        self.vespo_lambda_pos = vespo_lambda_pos
        self.vespo_k_neg = vespo_k_neg
        self.vespo_lambda_neg = vespo_lambda_neg

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss of B completions of T tokens.

        _input                [B, T, D], the hidden states that predict selected_token_ids
        lin_weight            [V, D]; it and bias are cast to the dtype of _input
        selected_token_ids    [B, T] integers
        attention_mask        [B, T] of 0 and 1
        advantages            [B]
        bias                  [V]
        ref_per_token_logps   [B, T]; or
        ref_input, ref_weight, ref_bias
                              the reference policy's _input, lin_weight and bias
        old_per_token_logps   [B, T] of the policy the ratio is taken against; None: on-policy
        vllm_is_ratio         [B], [B, 1] or [B, T] weights >= 0 of the tokens: trainer's over sampler's probability
        num_items_in_batch    dapo, cispo and vespo: tokens of all micro-batches and ranks, which are divided by the
                              number of ranks; None: the tokens of this call, averaged over the ranks

        Returns (loss, metrics): loss 0-d float32, the only thing that carries gradient (to _input, lin_weight and bias);
        metrics, means over the mask, 0-d: the divergence from the reference if beta is not 0, then the share of tokens at
        the bound of the clip. Raises TypeError or ValueError for arguments that do not fit, IndexError for a token
        outside of [0, V).
        """
        _check_shapes(
            _input, selected_token_ids, attention_mask, advantages,
            {"ref_per_token_logps": ref_per_token_logps, "old_per_token_logps": old_per_token_logps}, vllm_is_ratio,
        )  # fmt: skip
        mask = attention_mask != 0
        _require(((attention_mask == 1) | ~mask).all(), "attention_mask must be of 0 and 1")
        counted = torch.ones_like(mask) if self.loss_type == "luspo" else mask
        target = selected_token_ids.long().masked_fill(~counted, _LEFT_OUT)
        dtype = compute_dtype(_input)
        ref_logp = self._reference(target, ref_per_token_logps, ref_input, ref_weight, ref_bias)
        batch = _Batch(
            mask.to(dtype),
            counted,
            advantages.detach().to(dtype).masked_fill(~mask.any(1), 0)[:, None],
            _filled(old_per_token_logps, counted, dtype),
            _filled(ref_logp, counted, dtype),
            _importance(vllm_is_ratio, counted, dtype),
        )
        head = (_input.flatten(0, 1), lin_weight.to(_input.dtype), target.flatten())
        bias = None if bias is None else bias.to(_input.dtype)
        loss_of = self._row_local if self._is_row_local(batch) else self._general
        loss, ratio, kl_sum = loss_of(head, bias, batch, num_items_in_batch)

        tokens = batch.mask.sum().clamp(min=1)
        clipped = (self._clipped(ratio.detach(), batch.advantage) * batch.mask).sum() / tokens
        return loss, ((kl_sum.detach() / tokens,) if self.beta else ()) + (clipped,)

    def _reference(self, target, logp, hidden, weight, bias) -> Tensor | None:
        """[B, T] log-probs of the reference; None where there is no divergence from it to compute."""
        if not self.use_ref_model:
            return None
        if logp is None and hidden is None:
            raise ValueError("use_ref_model needs ref_per_token_logps or ref_input: pass one, or use_ref_model=False")
        if logp is not None and hidden is not None:
            warnings.warn("ref_per_token_logps and ref_input were both given: ref_input is not used", stacklevel=3)
        if not self.beta or logp is not None:
            return logp if self.beta else None
        if weight is None:
            raise ValueError("ref_input needs ref_weight, which is missing: pass it, or ref_per_token_logps")
        if hidden.shape[:-1] != target.shape:
            raise ValueError(f"ref_input is {list(hidden.shape)}: it must be {list(target.shape)} and D")
        bias = None if bias is None else bias.to(hidden.dtype)
        with torch.no_grad():
            return linear_logprob_entropy(
                hidden.flatten(0, 1), weight.to(hidden.dtype), target.flatten(), bias=bias,
                temperature=self.temperature, ignore_index=_LEFT_OUT,
            ).logp.view(target.shape)  # fmt: skip

    def _is_row_local(self, batch: _Batch) -> bool:
        """Whether `linear_policy_loss` can say it: a row's divergence has no weight of its own there."""
        if self.loss_type not in _CLIPPED or self.importance_sampling_level == "sequence":
            return False
        divergence = batch.ref_logp is not None
        if divergence and (self.loss_type in ("grpo", "luspo") or self.use_bias_correction_kl or self.beta < 0):
            return False
        # Below 1 + epsilon_high, delta also bounds the ratio where the advantage is positive.
        two_sided = self.delta is None or (self.delta > 1 and self.delta >= 1 + self.epsilon_high)
        return two_sided and 0 <= self.epsilon_low <= 1 and self.epsilon_high >= 0

    def _row_local(self, head, bias, batch: _Batch, num_items) -> tuple[Tensor, Tensor, Tensor]:
        weight, normalizer = self._token_weight(batch, num_items)
        scaled = batch.advantage * weight
        if batch.is_ratio is not None:
            scaled = scaled * batch.is_ratio
        divergence = batch.ref_logp is not None
        result = linear_policy_loss(
            *head,
            scaled.expand(batch.mask.shape).flatten(),
            None if batch.old_logp is None else batch.old_logp.flatten(),
            ref_logp=batch.ref_logp.flatten() if divergence else None,
            normalizer=normalizer,
            config=PolicyLossConfig(
                clip_low=self.epsilon_low,
                clip_high=self.epsilon_high,
                dual_clip=None if self.delta is None or math.isinf(self.delta) else self.delta,
                entropy_alpha=0.0,
                kl_coef=self.beta if divergence else 0.0,
            ),
            bias=bias,
            temperature=self.temperature,
            ignore_index=_LEFT_OUT,
        )
        return result.loss, result.ratio.view(batch.mask.shape), result.metrics.kl_sum

    def _general(self, head, bias, batch: _Batch, num_items) -> tuple[Tensor, Tensor, Tensor]:
        logp = linear_logprob_entropy(
            *head, bias=bias, temperature=self.temperature, ignore_index=_LEFT_OUT
        ).logp.view(batch.mask.shape)  # fmt: skip
        log_ratio = logp - (logp.detach() if batch.old_logp is None else batch.old_logp)
        if self.importance_sampling_level == "sequence":
            ratio = ((log_ratio * batch.mask).sum(1, keepdim=True) / batch.lengths.clamp(min=1)).exp()
        else:
            ratio = log_ratio.exp()
        loss = -self._objective(logp, log_ratio, ratio, batch)
        if batch.is_ratio is not None and self.loss_type != "vespo":
            loss = loss * batch.is_ratio.masked_fill(~batch.counted, 0)
        kl = torch.zeros_like(logp)
        if batch.ref_logp is not None:
            d = batch.ref_logp - logp
            kl = torch.expm1(d) - d
            if self.use_bias_correction_kl:
                kl = kl * ratio
            loss = loss + self.beta * kl
        weight, normalizer = self._token_weight(batch, num_items)
        return (loss * weight * batch.counted).sum() / normalizer, ratio, (kl * batch.mask).sum()

    def _objective(self, logp: Tensor, log_ratio: Tensor, ratio: Tensor, batch: _Batch) -> Tensor:
        """What is maximised, before the weights of tokens: [B, T], or [B, 1] with a ratio of the sequence."""
        advantage = batch.advantage
        if self.loss_type == "cispo":
            return ratio.detach().clamp(max=self.epsilon_high) * advantage * logp
        if self.loss_type == "sapo":
            slope = torch.where(advantage > 0, self.sapo_temperature_pos, self.sapo_temperature_neg)
            return 4 / slope * torch.sigmoid(slope * (ratio - 1)) * advantage
        if self.loss_type == "vespo":
            return self._vespo_weight(log_ratio.detach(), batch) * advantage * logp
        bounded = ratio if self.delta is None else ratio.clamp(max=self.delta)
        clipped = ratio.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)
        return torch.minimum(bounded * advantage, clipped * advantage)

    def _vespo_weight(self, log_ratio: Tensor, batch: _Batch) -> Tensor:
        """[B, 1] w^k e^(lambda (1 - w)) of the sequence's ratio w, in logarithms bounded to [log 1e-8, 20]."""
        log_w = (log_ratio.clamp(-20, 20) * batch.mask).sum(1, keepdim=True)
        if batch.is_ratio is not None:
            log_w = log_w + batch.is_ratio.log().clamp(math.log(1e-8), 20).sum(1, keepdim=True)
        log_w = log_w.clamp(math.log(1e-8), 20)
        positive = batch.advantage >= 0
        k = torch.where(positive, self.vespo_k_pos, self.vespo_k_neg)
        rate = torch.where(positive, self.vespo_lambda_pos, self.vespo_lambda_neg).clamp(min=1e-4)
        return (k * log_w + rate * (1 - log_w.exp())).exp().nan_to_num(0.0, 0.0, 0.0)

    def _token_weight(self, batch: _Batch, num_items) -> tuple[Tensor | float, Tensor | float]:
        """The weight of each sequence's tokens, [B, 1] or 1, and what the weighted sum is divided by."""
        sequences, width = batch.mask.shape
        if self.loss_type in ("grpo", "sapo"):
            return 1 / batch.lengths.clamp(min=1), max(sequences, 1)
        if self.loss_type == "luspo":
            return batch.lengths, max(sequences * width, 1)
        if self.loss_type == "dr_grpo":
            return 1.0, max(sequences, 1) * self.max_completion_length
        tokens = batch.mask.sum()
        return 1.0, (tokens if self.loss_type == "bnpo" else _tokens_per_rank(tokens, num_items)).clamp(min=1)

    def _clipped(self, ratio: Tensor, advantage: Tensor) -> Tensor:
        """Which ratios are beyond the bound that their advantage pushes them to; none where there is no such bound."""
        if self.loss_type in ("sapo", "vespo"):
            return torch.zeros_like(ratio)
        if self.loss_type == "cispo":
            return (ratio > self.epsilon_high) & (advantage > 0)
        low, high = 1 - self.epsilon_low, 1 + self.epsilon_high
        return ((ratio < low) & (advantage < 0)) | ((ratio > high) & (advantage > 0))


def _tokens_per_rank(tokens: Tensor, num_items: Tensor | float | None) -> Tensor:
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if num_items is not None:
        return torch.as_tensor(num_items, device=tokens.device).to(tokens.dtype) / ranks
    if ranks > 1:
        tokens = tokens.clone()
        dist.all_reduce(tokens)
    return tokens / ranks


def _filled(value: Tensor | None, counted: Tensor, dtype: torch.dtype) -> Tensor | None:
    return None if value is None else value.detach().to(dtype).masked_fill(~counted, 0)


def _importance(is_ratio: Tensor | None, counted: Tensor, dtype: torch.dtype) -> Tensor | None:
    """[B, 1] or [B, T], as given: what VESPO sums goes over the padding, too."""
    if is_ratio is None:
        return None
    is_ratio = is_ratio.detach().to(dtype).reshape(len(counted), -1)
    _require(~((is_ratio < 0) & counted).any(), "vllm_is_ratio must be >= 0")
    return is_ratio


def _require(holds: Tensor, rule: str):
    """At once on the CPU; on CUDA without waiting for the device."""
    if holds.device.type != "cpu":
        torch._assert_async(holds, rule)
    elif not holds:
        raise ValueError(rule)


def _check_shapes(hidden, token_ids, mask, advantages, per_token: dict[str, Tensor | None], is_ratio):
    if hidden.ndim != 3:
        raise ValueError(f"_input must be [B, T, D], got {list(hidden.shape)}: unflatten it")
    shape = hidden.shape[:2]
    for name, value in {"selected_token_ids": token_ids, "attention_mask": mask, **per_token}.items():
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} is {list(value.shape)} but _input is {list(hidden.shape)}: it must be [B, T]")
    if advantages.shape != shape[:1]:
        raise ValueError(f"advantages is {list(advantages.shape)}: it must be [B] = [{shape[0]}], one a completion")
    if is_ratio is not None and is_ratio.shape not in (shape[:1], (shape[0], 1), shape):
        raise ValueError(
            f"vllm_is_ratio is {list(is_ratio.shape)}: it must be [B], [B, 1] or [B, T], B, T = {list(shape)}"
        )
