"""Policy gradients in plain PyTorch with one rollout per prompt, on the model's logits and on the patched model.

    python examples/plain_loop.py

Both run the same four steps, each in its own process, whose peak memory shows the cost of the logits.
"""

import mssr.extras  # noqa: F401  first: it says in one line which library is missing  # isort: skip
import torch
from measuring.own_process import in_own_process, peak_mib
from transformers import Qwen2Config, Qwen2ForCausalLM

from mssr_kernels import PolicyLossConfig, next_token_target, patch

STEPS, PROMPTS, PROMPT, RESPONSE, VOCABULARY = 4, 12, 8, 24, 65_536
CLIP = PolicyLossConfig.ppo()


def tiny_model():
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, tie_word_embeddings=False, initializer_range=0.3, eos_token_id=None,
        )
    )  # fmt: skip


def loss_of_logits(model, tokens, target, advantage, old_logp):
    """The usual clipped policy loss: the logits of all positions, and the same memory again for the softmax."""
    log_p = torch.log_softmax(model(tokens).logits.float(), dim=-1)
    logp = log_p.gather(2, target.clamp(min=0)[..., None])[..., 0]
    ratio = torch.exp(logp - (logp.detach() if old_logp is None else old_logp))
    objective = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    return -objective[target != -100].mean(), logp.detach()


def fused_loss(model, tokens, target, advantage, old_logp):
    """The same loss from the patched model, which also returns entropies, clipped tokens and metrics."""
    out = model(
        tokens, target=target, advantage=advantage, old_logp=old_logp, config=CLIP, workspace_bytes=16 << 20
    )  # fmt: skip
    return out.loss, out.logp


def train(patched: bool) -> tuple[list[float], float]:
    """Return the losses, and the MiB that the updates added to the peak."""
    torch.manual_seed(0)
    model = patch(tiny_model()) if patched else tiny_model()
    loss_of = fused_loss if patched else loss_of_logits
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    losses, before = [], 0
    for step in range(STEPS):
        if step % 2 == 0:  # a rollout for two updates; reward: share of even tokens in the response
            prompts = torch.randint(VOCABULARY, (PROMPTS, PROMPT))
            tokens = model.generate(prompts, max_new_tokens=RESPONSE, do_sample=True, top_k=0)
            in_response = torch.arange(tokens.shape[1]).expand_as(tokens) >= PROMPT
            target = next_token_target(tokens, in_response)
            reward = (tokens[:, PROMPT:] % 2 == 0).float().mean(dim=1)
            advantage = (reward - reward.mean())[:, None].expand(target.shape)
            old_logp = None
            before = before or peak_mib()
        loss, logp = loss_of(model, tokens, target, advantage, old_logp)
        old_logp = logp if old_logp is None else old_logp
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, peak_mib() - before


def main() -> None:
    runs = {"logits": in_own_process(train, False), "patched": in_own_process(train, True)}
    for kind, (losses, mib) in runs.items():
        print(f"{kind:8} losses {' '.join(f'{loss:+.4f}' for loss in losses)}   memory of the loss {mib:5.0f} MiB")
    (theirs, logits_mib), (ours, patched_mib) = runs.values()
    apart = max(abs(a - b) for a, b in zip(ours, theirs))
    print(f"losses agree to {apart:.1e}; {patched_mib / logits_mib:.2f} of the memory")
    if apart > 1e-4:
        raise SystemExit("the losses differ")


if __name__ == "__main__":
    main()
