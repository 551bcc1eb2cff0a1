"""What is compared, by name: eager PyTorch, the same compiled, ours, and the peers of `bench.peers`.

They do not all do the same work, and `work` says what each does: a cross-entropy, without entropy and ratio, is cheaper.
"""

import torch

from mssr_kernels import PolicyLoss, linear_logprob_entropy, linear_policy_loss

from .inputs import Inputs
from .jobs import CONFIG, POLICY, Counts, Provider, Rows, Settings, eager, eager_rows, loss_of
from .peers import PEERS
from .report import EAGER

compiled_rows, compiled = torch.compile(eager_rows, dynamic=False), torch.compile(eager, dynamic=False)


def policy_loss(products: Counts, passes: Counts, backend: str = "auto", sparse: bool = False, **options) -> Provider:
    """Return a provider of `linear_policy_loss`."""

    def result(inputs: Inputs, settings: Settings) -> PolicyLoss:
        return linear_policy_loss(
            *inputs[:5], config=CONFIG, backend=backend, workspace_bytes=settings.workspace_mib << 20,
            vocab_drop_tol=settings.vocab_drop_tol if sparse else None,
        )  # fmt: skip

    return Provider(
        POLICY, lambda inputs, settings: result(inputs, settings).loss,
        lambda inputs, settings: Rows(*result(inputs, settings)[1:3]), products, passes, tasks=("loss", "frozen"),
        **options,
    )  # fmt: skip


def our_rows(inputs: Inputs, settings: Settings) -> Rows:
    found = linear_logprob_entropy(*inputs[:3], workspace_bytes=settings.workspace_mib << 20)
    return Rows(found.logp, found.entropy)


LOSS_IN_FORWARD = Counts(1, 2, 3), Counts(0, 4, 5)
OURS = {
    "mssr exact": policy_loss(*LOSS_IN_FORWARD),
    "mssr sparse": policy_loss(  # the products of the backward pass are counted as executed
        Counts(1, 1, 1), Counts(0, 3, 3), sparse=True, note="approximate gradients; FLOPs counted as executed"
    ),
    "mssr recompute": Provider(
        POLICY, loss_of(our_rows), our_rows, Counts(1, 3, 4), Counts(0, 2, 3), tasks=("loss", "frozen")
    ),
    "mssr forward": Provider(POLICY, None, our_rows, Counts(1, 1, 1), Counts(0, 0, 0), tasks=("forward",)),
    # On a CPU this is what "auto" takes.
    "mssr chunked exact": policy_loss(*LOSS_IN_FORWARD, backend="chunked", needs_cuda=True),
}
PROVIDERS = {
    EAGER: Provider(POLICY, eager, eager_rows, Counts(1, 2, 3), Counts(9, 14, 15)),
    "torch.compile": Provider(POLICY, compiled, compiled_rows, Counts(1, 2, 3), Counts(2, 5, 6)),
    **OURS,
    **PEERS,
}
