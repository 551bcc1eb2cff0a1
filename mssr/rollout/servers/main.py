"""vLLM's server, in which vLLM also knows our weight transfer for machines without NCCL. `mssr serve` runs it.

A main module of its own, and no plugin (`vllm.general_plugins`): it needs no installed metadata, and leaves other vLLM
processes in the same environment alone.
"""

import runpy

GLOO_TRANSFER = "mssr_gloo"


def register() -> None:
    """Makes vLLM know the transfer; its code is imported where it is used. Once is enough, twice does no harm."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory

    for factory, engine in (
        (WeightTransferEngineFactory, "GlooReceiver"),
        (WeightTransferTrainerFactory, "GlooSender"),
    ):
        if GLOO_TRANSFER not in factory._registry:
            factory.register_engine(GLOO_TRANSFER, "mssr.rollout.servers.gloo_transfer", engine)


if __name__ in ("__main__", "__mp_main__"):  # the second: in the processes that this one spawns
    register()

if __name__ == "__main__":
    # Not the `vllm` command: it looks for a distribution of that name, and the CPU build has another.
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
