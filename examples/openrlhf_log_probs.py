"""OpenRLHF's Actor without logits: the same log-probs, entropy and gradients after one call of `install`.

In a run, call `install` in every process that has an Actor; docs/INTEGRATIONS.md says how. Here a real Actor with a tiny
Qwen2 computes a policy gradient with our functions, and after `uninstall` with OpenRLHF's own.
"""

import sys

import mssr.extras  # noqa: F401  first: it says in one line which library is missing  # isort: skip
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from mssr.errors import UserError
from mssr.integrations import openrlhf


def tiny_model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=2048, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def scores(actor, sequences) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs and entropies of the last 16 tokens, [B, 16], and the head's gradient of a simple policy loss."""
    actor.zero_grad()
    mask = torch.ones_like(sequences)
    log_probs, output = actor(
        sequences, mask[:, -16:].bool(), attention_mask=mask, return_output=True, return_entropy=True
    )
    entropy = output.entropy[:, -16:]
    (-log_probs.mean() - 0.01 * entropy.mean()).backward()
    return log_probs.detach(), entropy.detach(), actor.model.lm_head.weight.grad.clone()


def main() -> None:
    version = openrlhf.install()
    from openrlhf.models import Actor

    actor, sequences = Actor(tiny_model(), temperature=0.8), torch.randint(2048, (4, 32))
    actor.packing_samples = False  # in a run, --ds.packing_samples
    found = scores(actor, sequences)
    openrlhf.uninstall()
    theirs = scores(actor, sequences)
    print(f"OpenRLHF {version}, {found[0].numel()} tokens, largest difference between its functions and ours:")
    for name, value, other in zip(("log-prob", "entropy", "gradient of the head"), found, theirs):
        print(f"  {name:21s} {(value - other).abs().max():.1e}  of values up to {other.abs().max():.1e}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
