"""Drop-in replacement of Liger's fused linear GRPO loss: replace the import, keep the calls.

    from mssr_kernels.liger import LigerFusedLinearGRPOLoss  # was: from liger_kernel.chunked_loss

Names, order and defaults of the arguments, and the results, are those of liger-kernel 0.8.1 to 0.8.5 (0.8.0 has no
`num_items_in_batch`, and weighs the KL term by the token's ratio at sequence level, too). Liger need not be installed. Loss
types: grpo (arXiv 2402.03300), bnpo, dr_grpo (2503.20783), dapo (2503.14476), cispo (2506.13585), sapo (2511.20347), luspo,
vespo; sequence-level ratios are those of GSPO (2507.18071).

What `linear_policy_loss` can express uses it, with gradients computed in the forward pass: a clipped objective is linear in
its advantage, so the advantage can absorb a row's weight >= 0. The rest takes log-probs from `linear_logprob_entropy` and
adds a few operations on [B, T].

Deliberate differences from Liger:

- Log-probs come from float32 logits. Liger rounds 16-bit logits, and sums dW in the dtype of the weight.
- Masked rows are not computed, whatever they hold (NaN and any token included), and the advantage of a completion without
  tokens is not read.
- A token outside the vocabulary raises IndexError in a row that counts. Liger takes its logit as 0.
- A mask other than 0 and 1, and a negative `vllm_is_ratio`, are errors.
- Log-ratios are clamped to +-20 (`PolicyLossConfig.log_ratio_cap`), so that no advantage of 0 meets an infinite ratio.
- Where `linear_policy_loss` computed the loss, a second backward raises RuntimeError.
"""

import math
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .config import PolicyLossConfig
from .core.inputs import compute_dtype
from .loss import linear_logprob_entropy, linear_policy_loss

_CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
_UNCLIPPED = ("cispo", "sapo", "vespo")  # these have no sequence-level ratio
_LOG_RATIO_CAP = PolicyLossConfig.log_ratio_cap
_LEFT_OUT = torch.iinfo(torch.int64).min  # -100 could be a token in the input


class _Batch(NamedTuple):
    """What the loss of each token depends on besides its log-prob. Log-probs are 0 in rows that do not count."""

    mask: Tensor  # [B, T] 0 or 1
    counted: Tensor  # [B, T] bool: has a loss. The mask, except in luspo
    advantage: Tensor  # [B, 1]
    old_logp: Tensor | None  # [B, T]
    ref_logp: Tensor | None  # [B, T]; None: no divergence
    is_ratio: Tensor | None  # [B, 1] or [B, T], as it was given

    @property
    def lengths(self) -> Tensor:
        return self.mask.sum(1, keepdim=True)


@dataclass(eq=False, repr=False)  # nn.Module's own
class LigerFusedLinearGRPOLoss(nn.Module):
    """The GRPO family of losses fused with the language-model head, with the signature of liger-kernel 0.8.5.

    Raises ValueError for an unknown option, or one that does not go with another.
    """

    beta: float = 0.04  # weight of the KL term against the reference policy: e^d - d - 1, d = ref_logp - logp
    compiled: bool = True  # no effect: it does not change results
    use_ref_model: bool = True  # True: the call needs ref_per_token_logps or ref_input; False: it ignores them
    chunk_size: int = 1  # no effect: memory is bounded anyway
    epsilon_low: float = 0.2  # the ratio is clipped to [1 - epsilon_low, 1 + epsilon_high]
    epsilon_high: float = 0.2  # in cispo the ratio is clipped to <= epsilon_high
    loss_type: str = "dapo"  # or "grpo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"
    max_completion_length: int | None = None  # tokens; required by dr_grpo, which divides by it and B
    importance_sampling_level: str = "token"  # level of the ratio, or "sequence" for the clipped loss types
    sapo_temperature_pos: float = 1.0  # slope of sapo's sigmoid for positive advantages
    sapo_temperature_neg: float = 1.05  # for others
    temperature: float = 1.0  # of the logits, > 0
    delta: float | None = None  # upper bound of the unclipped ratio; clipped loss types only
    use_bias_correction_kl: bool = False  # weigh each token's KL term by its ratio, gradient included
    vespo_k_pos: float = 2.0  # vespo's weight is w^k e^(lambda (1 - w)); for advantages >= 0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0  # for others
    vespo_lambda_neg: float = 2.0

    def __post_init__(self):
        super().__init__()
        kind, level = self.loss_type, self.importance_sampling_level
        if kind not in _CLIPPED + _UNCLIPPED:
            raise ValueError(f"loss_type must be one of {', '.join(_CLIPPED + _UNCLIPPED)}, got {kind!r}")
        if level not in ("token", "sequence"):
            raise ValueError(f"importance_sampling_level is {level!r}: 'token' or 'sequence'")
        if level == "sequence" and kind in _UNCLIPPED:
            raise ValueError(f"importance_sampling_level must be 'token' for loss_type {kind!r}, got 'sequence'")
        if kind == "dr_grpo" and not (self.max_completion_length or 0) > 0:
            raise ValueError(f"loss_type 'dr_grpo' needs max_completion_length > 0, got {self.max_completion_length!r}")
        slopes = self.sapo_temperature_pos, self.sapo_temperature_neg
        if not all(slope > 0 for slope in slopes):
            raise ValueError(f"sapo_temperature_* must be > 0, got {slopes[0]!r} and {slopes[1]!r}")
        if self.delta is not None and not self.delta > 0:
            raise ValueError(f"delta must be > 0 or None, got {self.delta!r}")

    def forward(
        self, _input: Tensor, lin_weight: Tensor, selected_token_ids: Tensor, attention_mask: Tensor, advantages: Tensor,
        bias: Tensor | None = None, ref_per_token_logps: Tensor | None = None, old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None, ref_weight: Tensor | None = None, ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None, num_items_in_batch: Tensor | float | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
        """Return the loss of B completions of T tokens, and metrics.

        _input                [B, T, D], the hidden states that predict selected_token_ids
        lin_weight, bias      [V, D] and [V]; cast to the dtype of _input
        selected_token_ids    [B, T] integers
        attention_mask        [B, T] of 0 and 1
        advantages            [B]
        ref_per_token_logps   [B, T] log-probs of the reference policy; or ref_input, ref_weight and ref_bias, its _input,
                              lin_weight and bias
        old_per_token_logps   [B, T] log-probs of the policy that the ratio is taken against; None: on-policy
        vllm_is_ratio         [B], [B, 1] or [B, T] weights >= 0 of the tokens: trainer's over sampler's probability
        num_items_in_batch    dapo, cispo and vespo: tokens of all micro-batches and ranks, divided by the number of ranks
                              here; None: the tokens of this call, averaged over the ranks

        The loss is 0-d float32 and alone carries gradient (to _input, lin_weight and bias). Metrics are 0-d means over the
        mask: the KL divergence from the reference policy if beta is not 0, then the share of clipped tokens. Raises
        TypeError or ValueError for arguments that do not fit, IndexError for a token outside [0, V).
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
        advantage = advantages.detach().to(dtype).masked_fill(~mask.any(1), 0)[:, None]
        old_logp, ref_logp = (
            None if logp is None else logp.detach().to(dtype).masked_fill(~counted, 0)
            for logp in (old_per_token_logps, ref_logp)
        )
        is_ratio = _importance(vllm_is_ratio, counted, dtype)
        batch = _Batch(mask.to(dtype), counted, advantage, old_logp, ref_logp, is_ratio)
        loss_of = self._row_local if self._is_row_local(batch) else self._general
        loss, ratio, kl_sum = loss_of(_flat_head(_input, lin_weight, target, bias), batch, num_items_in_batch)

        tokens = batch.mask.sum().clamp(min=1)
        clipped = (self._clipped(ratio.detach(), batch.advantage) * batch.mask).sum() / tokens
        return loss, ((kl_sum.detach() / tokens,) if self.beta else ()) + (clipped,)

    def _reference(self, target, logp, hidden, weight, bias) -> Tensor | None:
        """Return the reference policy's log-probs [B, T], or None where no KL term is computed."""
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
        with torch.no_grad():
            return self._logp(*_flat_head(hidden, weight, target, bias), target.shape)

    def _logp(self, hidden, weight, target, bias, shape) -> Tensor:
        options = dict(bias=bias, temperature=self.temperature, ignore_index=_LEFT_OUT)
        return linear_logprob_entropy(hidden, weight, target, **options).logp.view(shape)

    def _is_row_local(self, batch: _Batch) -> bool:
        """Return whether `linear_policy_loss` can express it: there the KL term has no weight per row."""
        if self.loss_type not in _CLIPPED or self.importance_sampling_level == "sequence":
            return False
        divergence = batch.ref_logp is not None
        if divergence and (self.loss_type in ("grpo", "luspo") or self.use_bias_correction_kl or self.beta < 0):
            return False
        # A delta below 1 + epsilon_high also bounds the ratio of positive advantages.
        two_sided = self.delta is None or (self.delta > 1 and self.delta >= 1 + self.epsilon_high)
        return two_sided and 0 <= self.epsilon_low <= 1 and self.epsilon_high >= 0

    def _row_local(self, head, batch: _Batch, num_items) -> tuple[Tensor, Tensor, Tensor]:
        token_weight, normalizer = self._token_weight(batch, num_items)
        scaled = batch.advantage * token_weight
        if batch.is_ratio is not None:
            scaled = scaled * batch.is_ratio
        divergence = batch.ref_logp is not None
        dual_clip = None if self.delta is None or math.isinf(self.delta) else self.delta
        kl_coef = self.beta if divergence else 0.0
        hidden, weight, target, bias = head
        result = linear_policy_loss(
            hidden, weight, target,
            scaled.expand(batch.mask.shape).flatten(),
            None if batch.old_logp is None else batch.old_logp.flatten(),
            ref_logp=batch.ref_logp.flatten() if divergence else None,
            config=PolicyLossConfig.ppo(self.epsilon_low, self.epsilon_high, dual_clip=dual_clip, kl_coef=kl_coef),
            normalizer=normalizer, bias=bias, temperature=self.temperature, ignore_index=_LEFT_OUT,
        )  # fmt: skip
        return result.loss, result.ratio.view(batch.mask.shape), result.metrics.kl_sum

    def _general(self, head, batch: _Batch, num_items) -> tuple[Tensor, Tensor, Tensor]:
        logp = self._logp(*head, batch.mask.shape)
        log_ratio = logp - (logp.detach() if batch.old_logp is None else batch.old_logp)
        if self.importance_sampling_level == "sequence":
            log_ratio = (log_ratio * batch.mask).sum(1, keepdim=True) / batch.lengths.clamp(min=1)
        ratio = log_ratio.clamp(-_LOG_RATIO_CAP, _LOG_RATIO_CAP).exp()
        loss = -self._objective(logp, log_ratio, ratio, batch)
        if batch.is_ratio is not None and self.loss_type != "vespo":
            loss = loss * batch.is_ratio.masked_fill(~batch.counted, 0)
        kl = torch.zeros_like(logp)
        if batch.ref_logp is not None:
            d = (batch.ref_logp - logp).clamp(-_LOG_RATIO_CAP, _LOG_RATIO_CAP)
            kl = torch.expm1(d) - d
            if self.use_bias_correction_kl:
                kl = kl * ratio
            loss = loss + self.beta * kl
        weight, normalizer = self._token_weight(batch, num_items)
        return (loss * weight * batch.counted).sum() / normalizer, ratio, (kl * batch.mask).sum()

    def _objective(self, logp: Tensor, log_ratio: Tensor, ratio: Tensor, batch: _Batch) -> Tensor:
        """Return what is maximised, before the weights of tokens: [B, T], or [B, 1] with sequence-level ratios."""
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
        """Return w^k e^(lambda (1 - w)), [B, 1], of the sequence's ratio w, with log w clamped to [log 1e-8, 20]."""
        log_w = (log_ratio.clamp(-20, 20) * batch.mask).sum(1, keepdim=True)
        if batch.is_ratio is not None:
            log_w = log_w + batch.is_ratio.log().clamp(math.log(1e-8), 20).sum(1, keepdim=True)
        log_w = log_w.clamp(math.log(1e-8), 20)
        positive = batch.advantage >= 0
        k = torch.where(positive, self.vespo_k_pos, self.vespo_k_neg)
        rate = torch.where(positive, self.vespo_lambda_pos, self.vespo_lambda_neg).clamp(min=1e-4)
        return (k * log_w + rate * (1 - log_w.exp())).exp().nan_to_num(0.0, 0.0, 0.0)

    def _token_weight(self, batch: _Batch, num_items) -> tuple[Tensor | float, Tensor | float]:
        """Return the weight of each sequence's tokens, [B, 1] or 1, and what the weighted sum is divided by."""
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
        """Return which ratios are clipped: beyond the bound that their advantage pushes them to."""
        if self.loss_type in ("sapo", "vespo"):
            return torch.zeros_like(ratio)
        if self.loss_type == "cispo":
            return (ratio > self.epsilon_high) & (advantage > 0)
        low, high = 1 - self.epsilon_low, 1 + self.epsilon_high
        return ((ratio < low) & (advantage < 0)) | ((ratio > high) & (advantage > 0))


def _flat_head(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return hidden [B T, D], weight and bias in its dtype, and target [B T], in the order of the arguments."""
    bias = None if bias is None else bias.to(hidden.dtype)
    return hidden.flatten(0, 1), weight.to(hidden.dtype), target.flatten(), bias


def _tokens_per_rank(tokens: Tensor, num_items: Tensor | float | None) -> Tensor:
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if num_items is not None:
        return torch.as_tensor(num_items, device=tokens.device).to(tokens.dtype) / ranks
    if ranks > 1:
        tokens = tokens.clone()
        dist.all_reduce(tokens)
    return tokens / ranks


def _importance(is_ratio: Tensor | None, counted: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return the ratio as [B, 1] or [B, T], as it was given: VESPO sums over the padding, too."""
    if is_ratio is None:
        return None
    is_ratio = is_ratio.detach().to(dtype).reshape(len(counted), -1)
    _require(~((is_ratio < 0) & counted).any(), "vllm_is_ratio must be >= 0")
    return is_ratio


def _require(holds: Tensor, rule: str):
    """Raise at once on the CPU; on CUDA assert on the device, without waiting for it."""
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
        raise ValueError(f"vllm_is_ratio is {list(is_ratio.shape)}: it must be [B], [B, 1] or [B, T] = {list(shape)}")
