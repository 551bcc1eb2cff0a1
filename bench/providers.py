"""What is compared, by name: eager PyTorch, the same compiled, ours, and the published packages of `bench.peers`.

The work differs, and `work` says how: a cross-entropy has no entropy and no ratio, and is the easier job.
"""

from collections.abc import Callable

import torch

from mssr_kernels import linear_logprob_entropy, linear_policy_loss, reference

from .inputs import Inputs
from .jobs import CONFIG, POLICY, Counts, Provider, Rows, Settings, eager, eager_rows, loss_of
from .peers import PEERS
from .report import EAGER

compiled_rows, compiled = torch.compile(eager_rows, dynamic=False), torch.compile(eager, dynamic=False)


def ours(backend: str, sparse: bool = False) -> Callable[[Inputs, Settings], Rows]:
    def result(inputs: Inputs, settings: Settings):
        return linear_policy_loss(
            *inputs[:5], config=CONFIG, backend=backend, softcap=inputs.softcap,
            workspace_bytes=settings.workspace_bytes, vocab_drop_tol=settings.vocab_drop_tol if sparse else None,
        )  # fmt: skip

    return result


def ours_fused(backend: str, products: Counts, passes: Counts, sparse: bool = False, **options) -> Provider:
    result = ours(backend, sparse)
    return Provider(
        POLICY, lambda inputs, settings: result(inputs, settings).loss,
        lambda inputs, settings: Rows(*result(inputs, settings)[1:3]), products, passes, tasks=("loss", "frozen"),
        **options,
    )  # fmt: skip


def ours_rows(backend: str) -> Callable[[Inputs, Settings], Rows]:
    def rows(inputs: Inputs, settings: Settings) -> Rows:
        found = linear_logprob_entropy(
            *inputs[:3], backend=backend, softcap=inputs.softcap, workspace_bytes=settings.workspace_bytes
        )
        return Rows(found.logp, found.entropy)

    return rows


def specification(inputs: Inputs, *_):
    """Our own eager reference, which handles all options and ignored rows and needs more memory for it."""
    return reference.linear_policy_loss(*inputs[:5], config=CONFIG, softcap=inputs.softcap)


LOSS_IN_FORWARD = Counts(1, 2, 3), Counts(0, 4, 5)
OURS = {
    "mssr reference": Provider(
        POLICY, lambda inputs, _: specification(inputs).loss, lambda inputs, _: Rows(*specification(inputs)[1:3]),
        Counts(1, 2, 3), Counts(11, 16, 17),
    ),
    "mssr exact": ours_fused("auto", *LOSS_IN_FORWARD),
    "mssr sparse": ours_fused(  # the products of the backward pass are counted as executed
        "auto", Counts(1, 1, 1), Counts(0, 3, 3), sparse=True,
        note="approximate gradients; FLOPs counted as executed",
    ),
    "mssr recompute": Provider(
        POLICY, loss_of(ours_rows("auto")), ours_rows("auto"), Counts(1, 3, 4), Counts(0, 2, 3), tasks=("loss", "frozen")
    ),
    "mssr forward": Provider(
        POLICY, None, ours_rows("auto"), Counts(1, 1, 1), Counts(0, 0, 0), tasks=("forward",)
    ),
    # On the CPU these are what "auto" is.
    "mssr chunked exact": ours_fused("chunked", *LOSS_IN_FORWARD, needs_cuda=True),
    "mssr chunked forward": Provider(
        POLICY, None, ours_rows("chunked"), Counts(1, 1, 1), Counts(0, 0, 0), needs_cuda=True, tasks=("forward",)
    ),
}  # fmt: skip
PROVIDERS = {
    EAGER: Provider(POLICY, eager, eager_rows, Counts(1, 2, 3), Counts(9, 14, 15)),
    "torch.compile": Provider(POLICY, compiled, compiled_rows, Counts(1, 2, 3), Counts(2, 5, 6)),
    **OURS,
    **PEERS,
}
