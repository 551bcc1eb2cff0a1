"""Start processes that have the slow imports done: a server imports them once and forks for each process."""

import multiprocessing
import os
from functools import cache
from multiprocessing.context import ForkServerContext


@cache
def forkserver() -> ForkServerContext:
    """Return a multiprocessing context. Its processes have the environment of the server's start: see `take_environment`."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when DeepSpeed is imported
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["mssr.environment", "mssr.training.loop", "deepspeed.runtime.zero.muon.muon_optimizer"]
    )
    return context


def take_environment(environment: dict[str, str]) -> None:
    """To be called first in a process from the server, with its parent's `dict(os.environ)`."""
    os.environ.clear()
    os.environ.update(environment)
