"""What is compared, by name: eager PyTorch, its compiled form, ours, and the published packages of `bench.peers`.

The work differs, and `work` says how: a cross-entropy has neither entropy nor ratio, and is the easier job.
"""

from collections.abc import Callable

import torch

from mssr_kernels import linear_logprob_entropy, linear_policy_loss, reference

from .inputs import Inputs
from .jobs import CONFIG, POLICY, Counts, Provider, Rows, Settings, clipped_loss, eager, eager_rows, loss_of
from .peers import PEERS

__all__ = ["CONFIG", "EAGER", "PROVIDERS", "clipped_loss", "eager"]

EAGER = "eager"  # what all others are measured against
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
    """Our own eager reference, which takes options and ignored rows into account and is hungrier for it."""
    return reference.linear_policy_loss(*inputs[:5], config=CONFIG, softcap=inputs.softcap)


LOSS_IN_FORWARD = Counts(1, 2, 3), Counts(0, 4, 5)
OURS = {
    "mssr reference": Provider(
        POLICY, lambda inputs, _: specification(inputs).loss, lambda inputs, _: Rows(*specification(inputs)[1:3]),
        Counts(1, 2, 3), Counts(11, 16, 17),
    ),
    "mssr exact": ours_fused("auto", *LOSS_IN_FORWARD),
    "mssr sparse": ours_fused(  # the products of the backward pass are counted as they are made
        "auto", Counts(1, 1, 1), Counts(0, 3, 3), sparse=True,
        note="gradients up to vocab_drop_tol; made products are counted",
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
