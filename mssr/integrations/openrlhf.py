"""OpenRLHF's log-probs and entropy without logits.

OpenRLHF's `Actor` (policy, reference, SFT, DPO) computes the logits of every token and passes them to `compute_entropy` and
`log_probs_from_logits`. After `install`, the head gets the shifted tokens and returns `Scores` instead of logits; the two
functions read their results from these. Everything else (packing, positions, image inputs, ring attention, masks, ZeRO,
LoRA) stays OpenRLHF's.

OpenRLHF has no switch for this: call `install` in every process that has an Actor; docs/INTEGRATIONS.md says how.
"""

import contextlib
import functools
import importlib
import inspect
import sys
from collections.abc import Iterator
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from mssr.errors import UserError
from mssr.integrations.versions import require_parameters, require_version
from mssr_kernels import FusedLMHead

_PARAMETERS = {
    "Actor.forward": [
        "self", "sequences", "action_mask", "attention_mask", "return_output", "allgather_logits", "return_logprobs",
        "ring_attn_group", "packed_seq_lens", "return_entropy", "mm_inputs",
    ],
    "log_probs_from_logits": ["logits", "labels", "temperature"],
    "compute_entropy": ["logits"],
    "unpad_and_slice_tensor": ["sequences", "attention_mask", "ring_attn_group"],
}  # fmt: skip


def install() -> str:
    """Make every Actor compute log-probs and entropy without logits; return OpenRLHF's version. May be called again.

    Raises:
        UserError: OpenRLHF is not installed, its version is not supported, or its functions take other arguments.
    """
    version = require_version("openrlhf")
    try:
        module = importlib.import_module("openrlhf.models.actor")
    except ImportError as error:  # on a CPU it lacks flash-attn
        raise UserError(f"openrlhf {version} cannot be imported: {error}; install what it needs") from None
    if hasattr(module.Actor.forward, "_without_logits"):
        return version
    for name, expected in _PARAMETERS.items():
        require_parameters(f"openrlhf {version}", functools.reduce(getattr, name.split("."), module), expected)
    module.Actor.forward = _without_logits(module.Actor.forward, module.unpad_and_slice_tensor)
    module.compute_entropy = _entropy_or(module.compute_entropy)
    module.log_probs_from_logits = _log_probs_or(module.log_probs_from_logits)
    return version


def uninstall() -> None:
    """Restore OpenRLHF's own functions; heads that were replaced still work as `nn.Linear`."""
    module = sys.modules.get("openrlhf.models.actor")
    if module is not None and hasattr(module.Actor.forward, "_without_logits"):
        for owner, name in ((module.Actor, "forward"), (module, "compute_entropy"), (module, "log_probs_from_logits")):
            setattr(owner, name, getattr(owner, name).__wrapped__)


class Scores(NamedTuple):
    """Log-probs and entropy of the shifted tokens, each [B, T] float32, in the place of logits.

    A tuple, so that ZeRO-3 finds its tensors. OpenRLHF casts logits and divides them by the temperature: here both are
    already done, so these methods change nothing.
    """

    logp: Tensor
    entropy: Tensor

    def to(self, *_) -> "Scores":
        return self

    def div_(self, _) -> "Scores":
        return self

    def _refuse(self, *_) -> NoReturn:
        raise UserError(
            "the model changes its logits after the head (a softcap or a scale), which mssr.integrations.openrlhf does not "
            "support: call uninstall() for this model"
        )

    __mul__ = __rmul__ = __truediv__ = __add__ = __sub__ = float = _refuse


class _ScoringHead(FusedLMHead):
    """The head of an Actor: returns logits, or within `scoring` the scores of its targets."""

    _targets: Tensor | None = None
    _temperature: float = 1.0

    def forward(self, hidden: Tensor) -> Tensor | Scores:
        if self._targets is None:
            return super().forward(hidden)
        found = super().forward(hidden, self._targets, temperature=self._temperature)
        return Scores(found.logp.view(self._targets.shape), found.entropy.view(self._targets.shape))

    @contextlib.contextmanager
    def scoring(self, targets: Tensor, temperature: float) -> Iterator[None]:
        self._targets, self._temperature = targets, temperature
        try:
            yield
        finally:
            del self._targets, self._temperature


def _without_logits(forward, unpad_and_slice):
    signature = inspect.signature(forward)

    @functools.wraps(forward)
    def scoring_forward(self, *args, **kwargs):
        call = signature.bind(self, *args, **kwargs)
        call.apply_defaults()
        asked = call.arguments
        if asked["action_mask"] is None and not asked["return_logprobs"]:
            return forward(self, *args, **kwargs)  # the caller wants the logits themselves
        if self.packing_samples:
            targets = unpad_and_slice(asked["sequences"], asked["attention_mask"], asked["ring_attn_group"])[2]
        else:
            targets = torch.roll(asked["sequences"], shifts=-1, dims=1)
        with _head(self.model).scoring(targets, self.temperature):
            return forward(self, *args, **kwargs)

    scoring_forward._without_logits = True
    return scoring_forward


def _head(model: nn.Module) -> _ScoringHead:
    """Return the head of a transformers model, which PEFT and DeepSpeed may wrap, ready to score."""
    transformer = next(module for module in model.modules() if hasattr(module, "get_output_embeddings"))
    head = transformer.get_output_embeddings()
    if type(head) is nn.Linear:
        # In place, since ZeRO-3's hooks and the tie to the embedding belong to this module.
        head.__class__ = _ScoringHead
    if not isinstance(head, _ScoringHead):
        raise UserError(
            f"the head of {type(transformer).__name__} is a {type(head).__name__}, not an nn.Linear: leave lm_head out of "
            "LoRA, quantisation and tensor parallelism, or do not install mssr.integrations.openrlhf"
        )
    return head


def _entropy_or(compute_entropy):
    @functools.wraps(compute_entropy)
    def entropy(logits: Tensor | Scores) -> Tensor:
        return logits.entropy if isinstance(logits, Scores) else compute_entropy(logits)

    return entropy


def _log_probs_or(log_probs_from_logits):
    @functools.wraps(log_probs_from_logits)
    def log_probs(logits: Tensor | Scores, labels: Tensor, temperature: float = 1.0) -> Tensor:
        if not isinstance(logits, Scores):
            return log_probs_from_logits(logits, labels, temperature)
        if temperature != 1.0 or labels.shape != logits.logp.shape:
            raise UserError(
                f"log_probs_from_logits got labels {list(labels.shape)} at temperature {temperature} for tokens "
                f"{list(logits.logp.shape)} that are already scored: this use of OpenRLHF's Actor is not supported"
            )
        return logits.logp

    return log_probs
