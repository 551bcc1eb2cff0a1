"""Processes that begin with the slow imports done: a server imports once and forks for each."""

import multiprocessing
import os
from functools import cache
from multiprocessing.context import ForkServerContext


@cache
def forkserver() -> ForkServerContext:
    """A context for processes that need nothing of this one's but what they are given."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when DeepSpeed is imported
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mssr.environment", "mssr.train", "deepspeed.runtime.zero.muon.muon_optimizer"])
    return context
