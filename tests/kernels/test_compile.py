"""torch.compile of a calling function: one node per operator, no graph break, the same values and gradients."""

import dataclasses

import pytest
import torch

from mssr_kernels import FusedLMHead, PolicyLossConfig, linear_logprob_entropy, linear_policy_loss

N, D, V = 40, 16, 300


def inputs():
    return torch.randn(N, D), torch.randn(V, D), torch.randint(V, (N,)), torch.randn(N), -torch.rand(N)


def policy(hidden, weight, target, advantage, old_logp):
    result = linear_policy_loss(
        hidden * 2, weight, target, advantage, old_logp, normalizer=7.0, config=PolicyLossConfig(entropy_coef=0.1)
    )
    return result.loss * 3 + 1, result.logp, result.entropy, result.clipped, *result.metrics


def scores(hidden, weight, target, advantage, old_logp):
    logp, entropy, lse = linear_logprob_entropy(hidden * 2, weight, target, temperature=0.7)
    return (logp * advantage).sum() + entropy.mean() + lse.sum(), logp, entropy, lse


class Backend:
    """Counts the graphs and our operators in them, and runs them with `aot_eager`."""

    def __init__(self):
        self.graphs, self.nodes = 0, []

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        self.nodes += [node.name for node in graph.graph.nodes if "mssr_kernels" in str(node.target)]
        return torch._dynamo.backends.debugging.aot_eager(graph, example_inputs)


@pytest.mark.parametrize("function", [policy, scores])
def test_one_node_and_no_graph_break(function):
    arguments = inputs()
    results = []
    backend = Backend()
    for call in (function, torch.compile(function, backend=backend, fullgraph=True)):
        for _ in range(2):  # the second call runs what the first compiled
            hidden, weight = (t.clone().requires_grad_() for t in arguments[:2])
            values = call(hidden, weight, *arguments[2:])
            values[0].backward()
        results.append([*(value.detach() for value in values), hidden.grad, weight.grad])
    assert backend.graphs == 1 and len(backend.nodes) == 1
    for eager, compiled in zip(*results):
        torch.testing.assert_close(compiled, eager)


def test_the_head_compiles():
    head = FusedLMHead(D, V, bias=False)
    hidden, _, target, advantage, _ = inputs()
    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(hidden, target), head(hidden, target))
    torch.testing.assert_close(compiled(hidden, target, advantage).loss, head(hidden, target, advantage).loss)
    torch.testing.assert_close(compiled(hidden), head(hidden))


@pytest.mark.parametrize("name", ["logprob_entropy", "policy_loss"])
def test_the_operators_keep_the_rules_of_the_dispatcher(name):
    """Schema, fake tensors and autograd registration pass PyTorch's own check."""
    hidden, weight, target, advantage, _ = inputs()
    hidden.requires_grad_(), weight.requires_grad_()
    tensors = (hidden, weight, None, target, None)
    options = dict(
        temperature=1.0, softcap=None, ignore_index=-100, workspace_bytes=1 << 20, backend="chunked", group=None
    )
    operator = getattr(torch.ops.mssr_kernels, name)
    if name == "policy_loss":
        tensors = (*tensors, None, advantage, *[None] * 4)
        options |= dict(normalizer_value=5.0, vocab_drop_tol=0.0, wanted=[True, True, False])
        options |= dataclasses.asdict(PolicyLossConfig())
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator, tensors, options, test_utils=tests)


def test_gradient_scaler_and_autocast_as_with_a_linear():
    """With a loss scaled by 2^16 under fp16 autocast, the unscaled gradients are those without scaling."""
    hidden, weight, target, advantage, _ = inputs()
    plain = [t.clone().requires_grad_() for t in (hidden.half().float(), weight.half().float())]
    linear_policy_loss(*plain, target, advantage, backend="reference").loss.backward()
    scaled = [t.clone().requires_grad_() for t in (hidden, weight)]
    optimizer = torch.optim.SGD(scaled, lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    with torch.autocast("cpu", torch.float16):
        loss = linear_policy_loss(*scaled, target, advantage).loss
    assert loss.dtype == torch.float32
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    for got, want in zip(scaled, plain):
        assert got.grad.dtype == torch.float32
        assert (got.grad - want.grad).norm() <= 2e-3 * want.grad.norm()
