"""verl's fused forward with our log-probs and entropy: the same results, after one import.

In a verl run, three options are enough:

    actor_rollout_ref.model.external_lib=mssr.integrations.verl_external_lib
    actor_rollout_ref.model.use_fused_kernels=True
    actor_rollout_ref.model.fused_kernel_options.impl_backend=torch

Here a tiny Qwen2 with verl's forward computes log-probs, entropy and gradients with verl's function and with ours.
"""

import sys

import mssr.extras  # noqa: F401  first: it says in one line which library is missing  # isort: skip
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from mssr.errors import UserError
from mssr.integrations import verl


def tiny_model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=2048, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def scores(model, tokens) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs of the next tokens, [B, T], their entropies, [B, T], and the head's gradient of a simple policy loss."""
    model.zero_grad()
    out = model(input_ids=tokens, temperature=0.8, return_dict=True)
    (-out.log_probs.mean() - 0.01 * out.entropy.mean()).backward()
    return out.log_probs.detach(), out.entropy.detach(), model.lm_head.weight.grad.clone()


def main() -> None:
    version = verl.install()
    from verl.models.transformers.monkey_patch import patch_forward_with_backends

    model, tokens = tiny_model(), torch.randint(2048, (4, 32))
    patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend="torch")
    found = scores(model, tokens)
    verl.uninstall()
    theirs = scores(model, tokens)
    print(f"verl {version}, {tokens.numel()} tokens, largest difference between verl's function and ours:")
    for name, value, other in zip(("log-prob", "entropy", "gradient of the head"), found, theirs):
        print(f"  {name:21s} {(value - other).abs().max():.1e}  of values up to {other.abs().max():.1e}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
