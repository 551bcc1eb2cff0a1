"""What a provider is, and its jobs: the losses, with eager PyTorch as their plain form."""

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
SEQUENCES = 8  # that Liger's GRPO loss gets; it takes one advantage per sequence


class Settings(NamedTuple):
    device: str
    repeats: int = 20
    seed: int = 0
    workspace_mib: int = 256
    vocab_drop_tol: float = 2.0**-8  # of mode sparse
    input_sets: int = 2

    @property
    def workspace_bytes(self) -> int:
        return self.workspace_mib << 20


class Rows(NamedTuple):
    logp: Tensor  # [N]
    entropy: Tensor | None  # [N]


class Counts(NamedTuple):
    """By task."""

    forward: int
    frozen: int
    loss: int


class Package(NamedTuple):
    module: str
    name: str  # for pip


class Provider(NamedTuple):
    objective: str  # of OBJECTIVES
    loss: Callable[[Inputs, Settings], Tensor] | None  # 0-d
    rows: Callable[[Inputs, Settings], Rows] | None  # None: it returns only the loss
    products: Counts  # matrix products of 2 NDV FLOPs, recomputed ones included
    passes: Counts  # how often something of size [N, V] passes between memory and processor, at least
    package: Package | None = None  # that it needs
    softcap: bool = True
    needs_cuda: bool = False
    tasks: tuple[str, ...] = TASKS
    note: str = ""

    @property
    def work(self) -> str:
        return f"{self.objective}; {self.note}" if self.note else self.objective

    def why_not(self, device: str, softcap: float | None) -> str | None:
        """Return why it cannot run with this device and softcap; None if it can."""
        if self.package and importlib.util.find_spec(self.package.module) is None:
            return f"not installed: pip install {self.package.name}"
        if self.needs_cuda and device != "cuda":
            return "needs a CUDA device"
        return "has no softcap" if softcap is not None and not self.softcap else None


def eager_rows(inputs: Inputs, *_) -> Rows:
    """Compute what a trainer without a fused head does: logits in the head's dtype, the rest in float32. As lean as possible:
    nothing of [N, V] outlives its use, and no gradient flows into the entropy, which the loss detaches."""
    log_p = torch.log_softmax(_eager_logits(inputs), dim=1)
    with torch.no_grad():
        entropy = -log_p.exp().mul_(log_p).sum(1)
    return Rows(log_p.gather(1, inputs.target[:, None])[:, 0], entropy)


def _eager_logits(inputs: Inputs) -> Tensor:
    logits = (inputs.hidden @ inputs.weight.T).float()
    return logits if inputs.softcap is None else inputs.softcap * torch.tanh(logits / inputs.softcap)


def clipped_loss(logp: Tensor, entropy: Tensor, inputs: Inputs) -> Tensor:
    limit = inputs.advantage.abs() / CONFIG.entropy_kappa
    shaped = inputs.advantage + torch.minimum(CONFIG.entropy_alpha * entropy.detach(), limit)
    return _clipped(logp, shaped, inputs)


def unshaped_loss(logp: Tensor, _: Tensor, inputs: Inputs) -> Tensor:
    """Return the loss with one advantage per sequence, its mean, as Liger's loss takes it."""
    means = inputs.advantage.view(sequences(inputs), -1).mean(1)
    return _clipped(logp, means.repeat_interleave(len(logp) // len(means)), inputs)


def _clipped(logp: Tensor, advantage: Tensor, inputs: Inputs) -> Tensor:
    ratio = (logp - inputs.old_logp).exp()
    clipped = ratio.clamp(1 - CONFIG.clip_low, 1 + CONFIG.clip_high)
    return -torch.minimum(ratio * advantage, clipped * advantage).mean()


def sequences(inputs: Inputs) -> int:
    return SEQUENCES if len(inputs.target) % SEQUENCES == 0 else 1


# (logp, entropy, inputs) -> the loss whose gradients a provider computes.
OBJECTIVES = {
    POLICY: clipped_loss,
    UNSHAPED: unshaped_loss,
    CROSS_ENTROPY: lambda logp, entropy, inputs: -logp.mean(),
}


def loss_of(rows: Callable[[Inputs, Settings], Rows]) -> Callable[[Inputs, Settings], Tensor]:
    """Return a loss in plain PyTorch on top of log-probs and entropies, as another trainer's own loss would be."""
    return lambda inputs, settings: clipped_loss(*rows(inputs, settings), inputs)


def eager(inputs: Inputs, *_) -> Tensor:
    return clipped_loss(*eager_rows(inputs), inputs)
