"""The language-model head as a module that can return the loss instead of the logits."""

from torch import Tensor, nn

from .api import linear_logprob_entropy, linear_policy_loss
from .types import LogprobEntropy, PolicyLoss


class FusedLMHead(nn.Linear):
    """nn.Linear whose forward, given targets, computes log-probs and entropy or the policy loss without the logits.

    The head must be *called*, not read: ZeRO-3 and FSDP gather its weight in the hooks of the module, and outside of
    them `lm_head.weight` is an empty shard.

    It adds no state to nn.Linear, so both of these keep the parameter objects, their names and their ties:

        model.lm_head = FusedLMHead.from_linear(model.lm_head)
        model.lm_head.__class__ = FusedLMHead
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "FusedLMHead":
        """A head that shares the very parameters of `linear` (a tied weight stays tied)."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"FusedLMHead.from_linear needs an nn.Linear, got {type(linear).__name__}")
        head = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        head.weight = linear.weight
        if linear.bias is not None:
            head.bias = linear.bias
        return head.train(linear.training)

    def forward(
        self, hidden: Tensor, target: Tensor | None = None, advantage: Tensor | None = None, **kwargs
    ) -> Tensor | LogprobEntropy | PolicyLoss:
        """hidden [..., D].

        without target                the logits [..., V], as nn.Linear
        target [...]                  LogprobEntropy, each [N]; keyword arguments of `linear_logprob_entropy`
        target and advantage [...]    PolicyLoss, per-row results [N]; keyword arguments of `linear_policy_loss`

        Leading dimensions are flattened, N = their product; per-row arguments have the shape of target.
        """
        if target is None:
            if advantage is not None or kwargs:
                given = ["advantage"] * (advantage is not None) + sorted(kwargs)
                raise ValueError(
                    f"FusedLMHead got {', '.join(given)} but no target: pass target, or hidden alone for logits"
                )
            return super().forward(hidden)

        if hidden.shape[:-1] != target.shape:
            raise ValueError(
                f"hidden is {list(hidden.shape)} but target is {list(target.shape)}: target needs hidden's leading shape"
            )

        def flatten(value):
            per_row = isinstance(value, Tensor) and value.ndim > 0
            if per_row and value.shape != target.shape:
                raise ValueError(f"a per-row argument is {list(value.shape)} but target is {list(target.shape)}")
            return value.reshape(-1) if per_row else value

        kwargs = {name: flatten(value) for name, value in kwargs.items()}
        rows = hidden.reshape(-1, hidden.shape[-1])
        labels = target.reshape(-1)
        if advantage is None:
            return linear_logprob_entropy(rows, self.weight, labels, bias=self.bias, **kwargs)
        return linear_policy_loss(rows, self.weight, labels, flatten(advantage), bias=self.bias, **kwargs)
