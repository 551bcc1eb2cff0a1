"""Start processes that have the slow imports done: a server imports them once and forks for each process."""

import multiprocessing
import os
from functools import cache
from multiprocessing.context import ForkServerContext


@cache
def forkserver() -> ForkServerContext:
    """Return a multiprocessing context. Its processes inherit nothing from this one but their arguments."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when DeepSpeed is imported
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mssr.environment", "mssr.train", "deepspeed.runtime.zero.muon.muon_optimizer"])
    return context
