"""What a provider is, and the losses that providers compute, in eager PyTorch."""

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mssr_kernels import PolicyLossConfig

from .inputs import Inputs

CONFIG = PolicyLossConfig()
TASKS = ("loss", "forward", "frozen")
POLICY, UNSHAPED, CROSS_ENTROPY = "policy loss with entropy", "policy loss without entropy", "cross-entropy alone"
SEQUENCES = 8  # for Liger's GRPO loss, which takes one advantage per sequence


class Settings(NamedTuple):
    device: str
    repeats: int = 20
    seed: int = 0
    workspace_mib: int = 256
    vocab_drop_tol: float = 2.0**-8  # of mode `sparse`
    input_sets: int = 2


class Rows(NamedTuple):
    logp: Tensor  # [N]
    entropy: Tensor | None  # [N]


class Counts(NamedTuple):
    """One count per task."""

    forward: int
    frozen: int
    loss: int


class Package(NamedTuple):
    module: str
    name: str  # in `pip install`


class Provider(NamedTuple):
    """One implementation that is measured.

    products: matrix products of 2 NDV FLOPs, recomputed ones included. passes: how often something of size [N, V] passes
    between memory and processor, at least.
    """

    objective: str  # of OBJECTIVES
    loss: Callable[[Inputs, Settings], Tensor] | None  # 0-d
    rows: Callable[[Inputs, Settings], Rows] | None  # None: it returns only the loss
    products: Counts
    passes: Counts
    package: Package | None = None
    needs_cuda: bool = False
    tasks: tuple[str, ...] = TASKS
    note: str = ""

    @property
    def work(self) -> str:
        return f"{self.objective}; {self.note}" if self.note else self.objective

    def why_not(self, device: str) -> str | None:
        """Return why it cannot run on this device; None if it can."""
        if self.package and importlib.util.find_spec(self.package.module) is None:
            return f"not installed: pip install {self.package.name}"
        return "needs a CUDA device" if self.needs_cuda and device != "cuda" else None


def eager_rows(inputs: Inputs, *_) -> Rows:
    """Compute what a trainer without a fused head does: logits in the head's dtype, the rest in float32."""
    return select_rows(torch.log_softmax((inputs.hidden @ inputs.weight.T).float(), dim=1), inputs.target)


def select_rows(log_p: Tensor, target: Tensor) -> Rows:
    """Return the targets' log-probs, and entropies without gradient, because the loss detaches them. log_p: [N, V]."""
    with torch.no_grad():
        entropy = -log_p.exp().mul_(log_p).sum(1)
    return Rows(log_p.gather(1, target[:, None])[:, 0], entropy)


def clipped_loss(logp: Tensor, entropy: Tensor, inputs: Inputs) -> Tensor:
    limit = inputs.advantage.abs() / CONFIG.entropy_kappa
    shaped = inputs.advantage + torch.minimum(CONFIG.entropy_alpha * entropy.detach(), limit)
    return _clipped(logp, shaped, inputs)


def unshaped_loss(logp: Tensor, _: Tensor, inputs: Inputs) -> Tensor:
    """Return the loss with one advantage per sequence, the mean, as Liger's loss takes it."""
    means = inputs.advantage.view(sequences(inputs), -1).mean(1)
    return _clipped(logp, means.repeat_interleave(len(logp) // len(means)), inputs)


def _clipped(logp: Tensor, advantage: Tensor, inputs: Inputs) -> Tensor:
    ratio = (logp - inputs.old_logp).exp()
    clipped = ratio.clamp(1 - CONFIG.clip_low, 1 + CONFIG.clip_high)
    return -torch.minimum(ratio * advantage, clipped * advantage).mean()


def sequences(inputs: Inputs) -> int:
    return SEQUENCES if len(inputs.target) % SEQUENCES == 0 else 1


# (logp, entropy, inputs) -> loss
OBJECTIVES = {
    POLICY: clipped_loss,
    UNSHAPED: unshaped_loss,
    CROSS_ENTROPY: lambda logp, entropy, inputs: -logp.mean(),
}


def loss_of(rows: Callable[[Inputs, Settings], Rows]) -> Callable[[Inputs, Settings], Tensor]:
    """Return the loss in plain PyTorch on top of log-probs and entropies, as in another trainer."""
    return lambda inputs, settings: clipped_loss(*rows(inputs, settings), inputs)


def eager(inputs: Inputs, *_) -> Tensor:
    return clipped_loss(*eager_rows(inputs), inputs)
