"""The language-model head as a module that can return log-probs or the loss instead of logits."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypedDict, Unpack, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from .config import LogprobEntropy, PolicyLoss, PolicyLossConfig
from .loss import linear_logprob_entropy, linear_policy_loss

_FORBIDDEN = "forbidden_bias"  # buffer [V]: 0, and -inf in the forbidden columns


class ScoreOptions(TypedDict, total=False):
    """Keyword arguments of `linear_logprob_entropy`, without the bias, which is the head's own."""

    temperature: Tensor | float
    softcap: float | None
    ignore_index: int
    backend: str
    workspace_bytes: int
    group: ProcessGroup | None


class LossOptions(ScoreOptions, total=False):
    """Keyword arguments of `linear_policy_loss`, without the bias."""

    old_logp: Tensor | None
    ref_logp: Tensor | None
    rollout_logp: Tensor | None
    shaping_entropy: Tensor | None
    normalizer: Tensor | float | None
    config: PolicyLossConfig
    vocab_drop_tol: float | None


class FusedLMHead(nn.Linear):
    """nn.Linear whose forward, given targets, computes log-probs and entropy or the policy loss without the logits.

    *Call* the head, do not read its weight: ZeRO-3 and FSDP gather the weight in the hooks of the module, and outside of
    them `lm_head.weight` is an empty shard.

    It adds no state to nn.Linear, so both of these keep the parameter objects, their names and their ties:

        model.lm_head = FusedLMHead.from_linear(model.lm_head)
        model.lm_head.__class__ = FusedLMHead

    The columns that `forbid` masks are not in the state dict either.
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "FusedLMHead":
        """Return a head that shares the parameters (a tied weight stays tied) and the hooks of `linear`."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"FusedLMHead.from_linear needs an nn.Linear, got {type(linear).__name__}")
        head = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        head.weight = linear.weight
        if linear.bias is not None:
            head.bias = linear.bias
        if _FORBIDDEN in linear._buffers:
            head.register_buffer(_FORBIDDEN, linear._buffers[_FORBIDDEN].clone(), persistent=False)
            head._forbidden_ids = linear._forbidden_ids
        # nn.Module's own dictionaries, and not copies: handles of the hooks refer to them.
        hooks = [name for name in vars(head) if "_hook" in name]
        vars(head).update({name: vars(linear)[name] for name in hooks})
        return head.train(linear.training)

    def forbid(self, token_ids: Iterable[int]) -> None:
        """Remove these tokens from the distribution, besides those already removed.

        Their probability is 0 in everything the head returns, logits included (-inf), as for a sampler that never draws some
        tokens (image pads). Nothing is learned or saved: the weight keeps the columns, which get no gradient. As a target,
        such a token has log-prob -inf, and a policy loss that uses it is NaN, or counts it as capped if there is an old_logp:
        check targets before.

        Raises:
            IndexError: a token outside [0, V).
        """
        forbidden = list(token_ids)
        outside = [token for token in forbidden if not 0 <= token < self.out_features]
        if outside:
            raise IndexError(f"forbid got token {outside[0]}: outside [0, {self.out_features})")
        if _FORBIDDEN not in self._buffers:
            # out_features: under ZeRO-3 the weight's own shape is [0].
            zeros = torch.zeros(self.out_features, dtype=self.weight.dtype, device=self.weight.device)
            self.register_buffer(_FORBIDDEN, zeros, persistent=False)
        self._forbidden_ids = sorted({*getattr(self, "_forbidden_ids", ()), *forbidden})
        self._fill_forbidden()

    def _apply(self, *args, **kwargs):
        """Convert or move the tensors; `to_empty`, which comes here, leaves buffers without content."""
        super()._apply(*args, **kwargs)
        if _FORBIDDEN in self._buffers:
            self._fill_forbidden()
        return self

    def _fill_forbidden(self) -> None:
        self._buffers[_FORBIDDEN].zero_()[self._forbidden_ids] = -math.inf

    @overload
    def forward(self, hidden: Tensor) -> Tensor: ...
    @overload
    def forward(self, hidden: Tensor, target: Tensor, **options: Unpack[ScoreOptions]) -> LogprobEntropy: ...
    @overload
    def forward(
        self, hidden: Tensor, target: Tensor, advantage: Tensor, **options: Unpack[LossOptions]
    ) -> PolicyLoss: ...

    def forward(self, hidden, target=None, advantage=None, **options):
        """Return the logits, log-probs and entropies, or the policy loss. hidden [..., D].

        without target                logits [..., V], as nn.Linear
        target [...]                  LogprobEntropy, each [N]; keyword arguments of `linear_logprob_entropy`
        target and advantage [...]    PolicyLoss, per-row results [N]; keyword arguments of `linear_policy_loss`

        Leading dimensions are flattened, N = their product; per-row arguments have the shape of target.
        """
        if target is None:
            if advantage is not None or options:
                given = ["advantage"] * (advantage is not None) + sorted(options)
                raise ValueError(f"FusedLMHead got {', '.join(given)} but no target: pass target, or only hidden")
            return F.linear(hidden, self.weight, self._column_bias())

        if hidden.shape[:-1] != target.shape:
            raise ValueError(
                f"hidden is {list(hidden.shape)} but target is {list(target.shape)}: target needs hidden's leading shape"
            )

        def flatten(name, value):
            per_row = isinstance(value, Tensor) and value.ndim > 0
            if per_row and value.shape != target.shape:
                raise ValueError(
                    f"{name} is {list(value.shape)} but target is {list(target.shape)}: expand it to target's shape"
                )
            return value.reshape(-1) if per_row else value

        if options.get("softcap") is not None and _FORBIDDEN in self._buffers:
            raise ValueError("softcap makes -inf finite, which brings forbidden columns back: drop softcap or forbid")
        options = {name: flatten(name, value) for name, value in options.items()}
        rows, labels, bias = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1), self._column_bias()
        if advantage is None:
            return linear_logprob_entropy(rows, self.weight, labels, bias=bias, **options)
        return linear_policy_loss(rows, self.weight, labels, flatten("advantage", advantage), bias=bias, **options)

    if TYPE_CHECKING:
        __call__ = forward  # nn.Module's takes and returns anything

    def _column_bias(self) -> Tensor | None:
        """Return the bias [V] in the weight's dtype, -inf in the forbidden columns; None where there is neither."""
        forbidden = self._buffers.get(_FORBIDDEN)
        if forbidden is None:
            return self.bias
        forbidden = forbidden.to(self.weight.dtype)
        return forbidden if self.bias is None else self.bias + forbidden
