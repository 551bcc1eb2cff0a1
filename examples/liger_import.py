"""Replace Liger's fused linear GRPO loss by changing its import; compare results, memory and time.

`train_step` is the whole example; the rest builds a batch and measures. The comparison needs `pip install liger-kernel`.
"""

import time

import mssr.extras  # noqa: F401  first: it says in one line which library is missing  # isort: skip
import torch
from measuring.own_process import in_own_process, peak_mib

from mssr_kernels.liger import LigerFusedLinearGRPOLoss  # was: from liger_kernel.chunked_loss import ...

COMPLETIONS, TOKENS, WIDTH, VOCABULARY = 4, 128, 512, 65536


def train_step(loss_class, hidden, weight, batch):
    grpo = loss_class(beta=0.04, loss_type="dapo", epsilon_high=0.28, compiled=False)
    loss, (divergence, clipped) = grpo(hidden, weight, **batch)
    loss.backward()
    return loss.item(), divergence.item(), clipped.item()


def make_batch():
    torch.manual_seed(0)
    hidden = torch.randn(COMPLETIONS, TOKENS, WIDTH, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH).mul_(0.05).requires_grad_()  # in place: no memory peak before the step
    tokens = torch.randint(VOCABULARY, (COMPLETIONS, TOKENS))
    logp = -11 - torch.rand(COMPLETIONS, TOKENS)
    return hidden, weight, {
        "selected_token_ids": tokens,
        "attention_mask": torch.arange(TOKENS) < torch.tensor([128, 100, 64, 30])[:, None],
        "advantages": torch.tensor([1.2, -0.7, 0.1, -0.6]),
        "old_per_token_logps": logp,
        "ref_per_token_logps": logp + 0.1 * torch.randn(COMPLETIONS, TOKENS),
    }  # fmt: skip


def measure(loss_class):
    """Return seconds, peak MiB beyond the inputs, and results of one step."""
    hidden, weight, batch = make_batch()
    before, start = peak_mib(), time.perf_counter()
    values = train_step(loss_class, hidden, weight, batch)
    seconds, mib = time.perf_counter() - start, peak_mib() - before
    return seconds, mib, values, hidden.grad.numpy(), weight.grad[::64].numpy()


if __name__ == "__main__":
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss as Liger
    except ImportError:
        raise SystemExit("this comparison needs Liger: pip install 'liger-kernel>=0.8.5,<0.9'") from None
    results = {"liger_kernel": in_own_process(measure, Liger)}
    results["mssr_kernels"] = in_own_process(measure, LigerFusedLinearGRPOLoss)
    for name, (seconds, mib, (loss, divergence, clipped), *_) in results.items():
        print(f"{name}: {seconds:.2f} s, {mib:.0f} MiB; loss {loss:.6f}, KL {divergence:.6f}, clipped {clipped:.4f}")
    theirs, ours = ([torch.from_numpy(grad) for grad in found[3:]] for found in results.values())
    for name, a, b in zip(("hidden", "weight"), ours, theirs):
        difference = float((a - b).norm() / b.norm())
        print(f"gradient by {name}: relative difference {difference:.1e}")
        assert difference < 1e-4
