"""Peers, each called through its published interface as its own trainer or example calls it.

Chunk sizes are those of the peer's trainer, but no more than the workspace of our kernels, so that small shapes are chunked.
"""

import torch
from torch import Tensor

from .inputs import Inputs
from .jobs import CONFIG, CROSS_ENTROPY, POLICY, UNSHAPED, Counts, Package, Provider, Rows, Settings, loss_of, sequences

TRL_TOKENS, TRL_COLUMNS = 4096, 32768  # TRL 1.16: tile; the trainer sets the columns
VERL_TOKENS = 512  # verl 0.9: tokens per chunk, each with the whole vocabulary
LIGER_TOKENS = 2048  # Liger 0.8: tile, which a chunk of short sequences does not fill


def torch_cross_entropy(inputs: Inputs, reduction: str) -> Tensor:
    return torch.nn.functional.linear_cross_entropy(inputs.hidden, inputs.weight, inputs.target, reduction=reduction)


def liger_sequences(inputs: Inputs) -> int:
    """Return how many sequences fill the tile. The default, 1, takes a third longer at 8 sequences of 64 tokens."""
    return max(1, LIGER_TOKENS * sequences(inputs) // len(inputs.target))


def liger_grpo(inputs: Inputs, _: Settings) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, epsilon_low=CONFIG.clip_low, epsilon_high=CONFIG.clip_high, compiled=True,
        chunk_size=liger_sequences(inputs),
    )  # fmt: skip
    target, advantage, old_logp = (t.view(sequences(inputs), -1) for t in inputs[2:5])
    return loss(
        inputs.hidden.view(*target.shape, -1),
        inputs.weight,
        target,
        torch.ones_like(old_logp),
        advantage.mean(1),
        old_per_token_logps=old_logp,
    )[0]


def liger_cross_entropy(inputs: Inputs, reduction: str) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction=reduction)
    return loss(inputs.weight, inputs.hidden, inputs.target)


def liger_scaled(inputs: Inputs, _: Settings) -> Rows:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(
        inputs.hidden, inputs.weight, inputs.target, 1.0, -100, 1, True
    )
    return Rows(-nll, entropy)


def cut_cross_entropy(**options):
    def loss(inputs: Inputs, reduction: str) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(inputs.hidden, inputs.weight, inputs.target, reduction=reduction, **options)

    return loss


def quack(inputs: Inputs, _: Settings) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(inputs.hidden, inputs.weight, inputs.target)


def verl_kernel(inputs: Inputs, _: Settings) -> Rows:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return Rows(*linear_cross_entropy(inputs.hidden, inputs.weight, inputs.target, 1.0, "none"))


def verl_tokens(inputs: Inputs, settings: Settings) -> int:
    row_bytes = len(inputs.weight) * inputs.weight.itemsize
    return max(1, min(VERL_TOKENS, (settings.workspace_mib << 20) // row_bytes))


def verl_torch(inputs: Inputs, settings: Settings) -> Rows:
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    chunked = FusedLinearForPPO(chunk_size=verl_tokens(inputs, settings))
    return Rows(*chunked(inputs.hidden, inputs.weight, inputs.target))


def trl_columns(inputs: Inputs, settings: Settings) -> int:
    column_bytes = min(TRL_TOKENS, len(inputs.hidden)) * inputs.hidden.itemsize
    return max(1, min(TRL_COLUMNS, len(inputs.weight), (settings.workspace_mib << 20) // column_bytes))


def trl(inputs: Inputs, settings: Settings) -> Rows:
    from trl.kernels import ChunkedLogProbFunction

    columns = trl_columns(inputs, settings)
    logp, entropy, *_ = ChunkedLogProbFunction.apply(
        inputs.hidden, inputs.weight, None, inputs.target, 1.0, columns, None, 1.0, ("entropy",)
    )
    return Rows(logp, entropy)


def cross_entropy(loss, products: Counts, passes: Counts, **options) -> Provider:
    """loss: (inputs, reduction) -> mean, or loss per row."""
    return Provider(
        CROSS_ENTROPY, lambda inputs, _: loss(inputs, "mean"), lambda inputs, _: Rows(-loss(inputs, "none"), None),
        products, passes, **options,
    )  # fmt: skip


def log_probs(rows, products: Counts, passes: Counts, **options) -> Provider:
    return Provider(POLICY, loss_of(rows), rows, products, passes, **options)


LIGER = {"package": Package("liger_kernel", "liger-kernel")}
CCE = {"package": Package("cut_cross_entropy", "cut-cross-entropy")}
VERL = {"package": Package("verl", "verl")}
FROZEN_NOTE = "the head's gradient formed even where it is frozen"
PEERS = {
    "liger GRPO": Provider(
        UNSHAPED, liger_grpo, None, Counts(3, 3, 4), Counts(5, 5, 6), **LIGER,
        note="no log-probs, and hidden's gradient even where none is asked for",
    ),
    "liger scaled CE": log_probs(
        liger_scaled, Counts(1, 4, 4), Counts(0, 3, 3), **LIGER,
        note=f"{FROZEN_NOTE}; off Hopper always 512 tokens at a time",
    ),
    "liger CE": cross_entropy(liger_cross_entropy, Counts(1, 2, 3), Counts(2, 4, 5), needs_cuda=True, **LIGER),
    "trl": log_probs(trl, Counts(1, 3, 4), Counts(2, 6, 7), package=Package("trl", "trl")),
    "verl": log_probs(verl_kernel, Counts(1, 4, 4), Counts(0, 3, 3), needs_cuda=True, **VERL, note=FROZEN_NOTE),
    "verl torch": log_probs(verl_torch, Counts(1, 4, 4), Counts(6, 14, 14), **VERL, note=FROZEN_NOTE),
    "torch linear CE": cross_entropy(torch_cross_entropy, Counts(1, 2, 3), Counts(3, 8, 9)),
    "cce": cross_entropy(
        cut_cross_entropy(), Counts(1, 2, 2), Counts(0, 0, 0), needs_cuda=True, **CCE,
        note="small gradients filtered out; products it may skip are not counted",
    ),
    "cce exact": cross_entropy(
        cut_cross_entropy(filter_eps=None), Counts(1, 3, 4), Counts(0, 0, 0), needs_cuda=True, **CCE
    ),
    "cce torch_compile": cross_entropy(
        cut_cross_entropy(impl="torch_compile"), Counts(1, 2, 3), Counts(2, 5, 6), **CCE
    ),
    "quack CE": Provider(
        CROSS_ENTROPY, quack, None, Counts(1, 2, 3), Counts(2, 4, 5), package=Package("quack", "quack-kernels"),
        needs_cuda=True, note="no log-probs",
    ),
}  # fmt: skip
