"""Copies the trainer's weights into a vLLM engine of the same process: one pass, in place, with every weight accounted for.

ZeRO-0, 1 and 2 pass the parameters themselves; ZeRO-3 gathers bucket by bucket (`named_weights`). vLLM loads them as it
would load a checkpoint: it renames, merges (q, k, v), splits over tensor-parallel ranks, quantises and repacks them, one
layer at a time, into the memory that the layer already has.
"""

from collections.abc import Iterable, Iterator

from torch import Tensor

from mssr.errors import UserError
from mssr.policy.model import Policy
from mssr.policy.weights import named_weights, weight_shapes


def sync_weights(llm, policy: Policy, *, bucket_bytes: int) -> None:
    """Make the next request of `llm` (a `vllm.LLM`) sample from the policy's weights. Collective over the ranks.

    bucket_bytes: what ZeRO-3 gathers at once.

    Raises:
        UserError: a weight of the policy was not sent, or one of vLLM's was not written.
    """
    sent: set[str] = set()

    def recorded() -> Iterator[tuple[str, Tensor]]:
        for name, weight in named_weights(policy, bucket_bytes):
            sent.add(name)
            yield name, weight

    (untouched,) = llm.collective_rpc(load_weights, args=(recorded(),))
    expected = weight_shapes(policy).keys()
    refuse_partial_sync(sorted(expected - sent), untouched)
    reset_caches(llm)


def load_weights(worker, weights: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Load weights in vLLM's worker. Return the parameters, by vLLM's names, that no weight was loaded into."""
    model = worker.model_runner.get_model()
    parameters = {name for name, _ in model.named_parameters()}
    loaded: set[str] = set()
    load = model.load_weights

    def recording(stream: Iterable[tuple[str, Tensor]]) -> set[str]:
        loaded.update(load(stream))
        return loaded

    model.load_weights = recording
    try:
        worker.model_runner.reload_weights(weights_iterator=weights)
    finally:
        del model.load_weights
    return sorted(parameters - loaded)


def refuse_partial_sync(unsent: list[str], untouched: list[str]) -> None:
    """Refuse a sync that left out a weight of the policy (`unsent`) or of vLLM's model (`untouched`), by name."""
    for names, what in ((unsent, "were not sent to vLLM"), (untouched, "of vLLM's were not written")):
        if names:
            raise UserError(
                f"weight sync: {len(names)} weights {what}, the first {names[0]}; "
                "this model's layout is not vLLM's: report it, and set rollout.engine=hf meanwhile"
            )


def reset_caches(llm) -> None:
    """Drop what vLLM computed with the previous weights: keys and values, preprocessed inputs, and image embeddings.
    Without the last, an image seen before would silently keep its old embedding."""
    llm.reset_prefix_cache()
    llm.reset_mm_cache()
    llm.llm_engine.reset_encoder_cache()
