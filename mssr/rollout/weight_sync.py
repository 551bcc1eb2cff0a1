"""The trainer's weights into a vLLM engine of the same process: one pass, in place, every weight accounted for.

ZeRO-0, 1 and 2 hand over the parameters themselves; ZeRO-3 gathers layer by layer (`named_weights`). vLLM loads them as
it would load a checkpoint: it renames, merges (q, k, v), splits over tensor-parallel ranks, quantises and repacks, one
layer at a time into the memory that the layer already has.
"""

from collections.abc import Iterable, Iterator

from torch import Tensor

from mssr.errors import UserError
from mssr.policy.model import Policy
from mssr.policy.weights import named_weights, weight_shapes


def sync_weights(llm, policy: Policy, *, bucket_bytes: int) -> None:
    """Makes the next request of `llm` (a `vllm.LLM`) sample from the policy's weights. Collective over the ranks.

    bucket_bytes: ZeRO-3 gathers so much at once.

    Raises:
        UserError: a weight that vLLM did not take, or one of its own that it did not get.
    """
    sent = Counted(named_weights(policy, bucket_bytes))
    (untouched,) = llm.collective_rpc(load_weights, args=(sent,))
    expected = weight_shapes(policy).keys()
    refuse_partial_sync(sorted(expected - sent.names), untouched)
    reset_caches(llm)


def load_weights(worker, weights: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Runs in vLLM's worker. Returns the names (vLLM's own) of the parameters that no weight was loaded into."""
    model = worker.model_runner.get_model()
    parameters = {name for name, _ in model.named_parameters()}
    loaded: set[str] = set()
    load = model.load_weights

    def remembering(stream: Iterable[tuple[str, Tensor]]) -> set[str]:
        loaded.update(load(stream))
        return loaded

    model.load_weights = remembering
    try:
        worker.model_runner.reload_weights(weights_iterator=weights)
    finally:
        del model.load_weights
    return sorted(parameters - loaded)


def refuse_partial_sync(unsent: list[str], untouched: list[str]) -> None:
    """Raises:
    UserError: names the first weight of the policy that was not sent, or of vLLM that was not written.
    """
    for names, what in ((unsent, "were not sent to vLLM"), (untouched, "of vLLM's were not written")):
        if names:
            raise UserError(
                f"weight sync: {len(names)} weights {what}, the first {names[0]}; "
                "this model's layout is not vLLM's: report it, and set rollout.engine=hf meanwhile"
            )


def reset_caches(llm) -> None:
    """All that vLLM computed with the weights before: keys and values, preprocessed inputs, and the vision tower's
    embeddings. Without the last, an image seen before keeps its old embedding and nothing says so."""
    llm.reset_prefix_cache()
    llm.reset_mm_cache()
    llm.llm_engine.reset_encoder_cache()


class Counted:
    """The weights as they pass by. names: of those that have."""

    def __init__(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.names: set[str] = set()
        self._weights = weights

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, weight in self._weights:
            self.names.add(name)
            yield name, weight
