"""The tests' device, the heads of Qwen2.5-VL, and inputs for them."""

import functools

import torch

from mssr_kernels import linear_logprob_entropy, linear_policy_loss

DEVICE = "cuda"
HEADS = {"3b": (2048, 151936), "7b": (3584, 152064)}  # (D, V)
BACKENDS = ("triton", "chunked")


def random(*shape):
    return torch.randn(*shape, device=DEVICE)


@functools.lru_cache(maxsize=1)
def head_weight(d, v, dtype):
    generator = torch.Generator(DEVICE).manual_seed(7)
    return torch.randn(v, d, device=DEVICE, generator=generator).to(dtype)


def problem(n, d, v, dtype=torch.bfloat16):
    """Return hidden, weight, target. Logits are noise of standard deviation 2; the label's is 12 to 25 higher.

    The last label is the last column. With three rows or more, one row is ignored and full of NaN.
    """
    weight = head_weight(d, v, dtype)
    target = torch.randint(v, (n,), device=DEVICE)
    target[-1] = v - 1
    size = torch.linspace(18, 25, n, device=DEVICE)
    size[1::2] -= 6
    hidden = 2 * random(n, d) / d**0.5 + size[:, None] * weight[target].float() / d
    if n > 2:
        target[1], hidden[1] = -100, torch.nan
    return hidden.to(dtype), weight, target


def policy_rows(logp):
    """Return per-row arguments of the policy loss: log-probs near `logp`, and advantages of which some are zero."""
    n = len(logp)
    advantage = random(n)
    advantage[3:6] = 0
    return dict(
        advantage=advantage,
        old_logp=logp + 0.3 * random(n),
        ref_logp=logp + 0.3 * random(n),
        rollout_logp=logp + 0.3 * random(n),
    )


def score(coefficients, hidden, weight, target, bias=None, **arguments):
    """Return ((logp, entropy, lse), gradients) of linear_logprob_entropy. coefficients: upstream gradient [3, N]."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (hidden, weight, bias)]
    values = linear_logprob_entropy(leaves[0], leaves[1], target, bias=leaves[2], **arguments)
    sum((c * value).sum() for c, value in zip(coefficients, values)).backward()
    return [value.detach() for value in values], [None if t is None else t.grad for t in leaves]


def learn(rows, hidden, weight, target, bias=None, **arguments):
    """Return (PolicyLoss, gradients) of linear_policy_loss."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (hidden, weight, bias)]
    result = linear_policy_loss(leaves[0], leaves[1], target, bias=leaves[2], **rows, **arguments)
    result.loss.backward()
    return result, [None if t is None else t.grad for t in leaves]
