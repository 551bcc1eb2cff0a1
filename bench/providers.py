"""What is compared: each provider computes a loss of the same inputs, through its published interface.

The work differs, and `work` says how: a cross-entropy has neither entropy nor ratio, and is the easier job.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mssr_kernels import PolicyLossConfig, linear_logprob_entropy, linear_policy_loss, reference

from .inputs import Inputs

CONFIG = PolicyLossConfig()


class Provider(NamedTuple):
    work: str
    loss: Callable[[Inputs, int, float], Tensor]  # (inputs, workspace_bytes, vocab_drop_tol)


def eager(inputs: Inputs, *_) -> Tensor:
    """What a trainer without a fused loss does: logits in the dtype of the head, the rest in float32."""
    log_p = torch.log_softmax((inputs.hidden @ inputs.weight.T).float(), dim=1)
    logp = log_p.gather(1, inputs.target[:, None])[:, 0]
    return clipped_loss(logp, -(log_p.exp() * log_p).sum(1), inputs)


def specification(inputs: Inputs, *_) -> Tensor:
    """Our own eager reference, which takes options and ignored rows into account and is hungrier for it."""
    return reference.linear_policy_loss(*inputs[:5], config=CONFIG).loss


def ours(backend: str, sparse: bool = False) -> Callable:
    def loss(inputs: Inputs, workspace_bytes: int, vocab_drop_tol: float) -> Tensor:
        return linear_policy_loss(
            *inputs[:5], config=CONFIG, backend=backend, workspace_bytes=workspace_bytes,
            vocab_drop_tol=vocab_drop_tol if sparse else None,
        ).loss  # fmt: skip

    return loss


def ours_general(backend: str) -> Callable:
    """Log-probs and entropies as tensors, the loss in plain PyTorch: what another trainer's own loss would do."""

    def loss(inputs: Inputs, workspace_bytes: int, _: float) -> Tensor:
        logp, entropy, _ = linear_logprob_entropy(*inputs[:3], backend=backend, workspace_bytes=workspace_bytes)
        return clipped_loss(logp, entropy, inputs)

    return loss


def clipped_loss(logp: Tensor, entropy: Tensor, inputs: Inputs) -> Tensor:
    limit = inputs.advantage.abs() / CONFIG.entropy_kappa
    advantage = inputs.advantage + torch.minimum(CONFIG.entropy_alpha * entropy.detach(), limit)
    ratio = (logp - inputs.old_logp).exp()
    clipped = ratio.clamp(1 - CONFIG.clip_low, 1 + CONFIG.clip_high)
    return -torch.minimum(ratio * advantage, clipped * advantage).mean()


compiled = torch.compile(eager, dynamic=False)


def torch_cross_entropy(inputs: Inputs, *_) -> Tensor:
    return torch.nn.functional.linear_cross_entropy(inputs.hidden, inputs.weight, inputs.target)


def torch_cross_entropy_chunked(inputs: Inputs, *_) -> Tensor:
    return torch.nn.functional.linear_cross_entropy(
        inputs.hidden, inputs.weight, inputs.target, options=torch.nn.LinearCrossEntropyOptions()
    )


def liger_grpo(inputs: Inputs, *_) -> Tensor:
    """One sequence a chunk is Liger's own default; here eight sequences."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    sequences = 8 if len(inputs.target) % 8 == 0 else 1
    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, epsilon_low=0.2, epsilon_high=0.3, compiled=True)
    rows = [t.view(sequences, -1) for t in (inputs.target, inputs.advantage, inputs.old_logp)]
    return loss(
        inputs.hidden.view(sequences, -1, inputs.hidden.shape[1]),
        inputs.weight,
        rows[0],
        torch.ones_like(rows[0], dtype=torch.float32),
        rows[1].mean(1),  # an advantage for each sequence is all it takes
        old_per_token_logps=rows[2],
    )[0]


def liger_cross_entropy(inputs: Inputs, *_) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(inputs.weight, inputs.hidden, inputs.target)


POLICY, CROSS_ENTROPY = "policy loss with entropy", "cross-entropy alone"
PROVIDERS = {
    "eager": Provider(POLICY, eager),
    "mssr reference": Provider(POLICY, specification),
    "mssr L": Provider(POLICY, ours("auto")),
    "mssr S": Provider(POLICY, ours("auto", sparse=True)),
    "mssr G": Provider(POLICY, ours_general("auto")),
    "mssr chunked L": Provider(POLICY, ours("chunked")),
    "torch.compile": Provider(POLICY, compiled),
    "liger GRPO": Provider("policy loss without entropy", liger_grpo),
    "liger CE": Provider(CROSS_ENTROPY, liger_cross_entropy),
    "torch linear CE": Provider(CROSS_ENTROPY, torch_cross_entropy),
    "torch linear CE chunked": Provider(CROSS_ENTROPY, torch_cross_entropy_chunked),
}
GPU_ONLY = {"liger CE", "mssr chunked L"}  # a Triton kernel; on the CPU "auto" is "chunked"
