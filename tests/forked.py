"""Start processes without repeating the slow imports: a server imports everything once and forks each process."""

import multiprocessing
import os
from functools import cache
from multiprocessing.context import ForkServerContext


@cache
def forkserver() -> ForkServerContext:
    """Return a multiprocessing context. Its processes inherit the server's environment: see `take_environment`."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when DeepSpeed is imported
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["mssr.environment", "mssr.training.loop", "mssr.observe.plots", "deepspeed.runtime.zero.muon.muon_optimizer"]
    )
    return context


def take_environment(environment: dict[str, str]) -> None:
    """Replace the environment. Call this first in a forked process, with its parent's `dict(os.environ)`."""
    os.environ.clear()
    os.environ.update(environment)
