"""torch.compile of a calling function: one node per operator, no graph break, the same values and gradients."""

import dataclasses

import pytest
import torch
from patched_models import batch, tiny

from mssr_kernels import FusedLMHead, PolicyLossConfig, linear_logprob_entropy, linear_policy_loss, patch

N, D, V = 40, 16, 300


def inputs(n=N):
    return torch.randn(n, D), torch.randn(V, D), torch.randint(V, (n,)), torch.randn(n), -torch.rand(n)


def policy(hidden, weight, target, advantage, old_logp, normalizer=7.0, temperature=1.0):
    result = linear_policy_loss(
        hidden * 2, weight, target, advantage, old_logp, normalizer=normalizer, temperature=temperature,
        config=PolicyLossConfig(entropy_coef=0.1),
    )  # fmt: skip
    return result.loss * 3 + 1, result.logp, result.entropy, result.clipped, *result.metrics


def scores(hidden, weight, target, advantage, old_logp, normalizer=7.0, temperature=0.7):
    logp, entropy, lse = linear_logprob_entropy(hidden * 2, weight, target, temperature=temperature)
    return (logp * advantage).sum() + entropy.mean() + lse.sum(), logp, entropy, lse


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()


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


SIZES = (8, 12, 17, 30, 7)


@pytest.mark.parametrize("function", [policy, scores])
@pytest.mark.parametrize("dynamic", [None, True])
def test_neither_the_number_of_rows_nor_a_number_compiles_a_new_graph(function, dynamic):
    """As in plain PyTorch: one graph for the first call, one for all others."""
    backend = Backend()
    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)
    for i, n in enumerate(SIZES):
        arguments = (*inputs(n), 7.0 + i, 0.8 + i / 10)
        results = []
        for call in (function, compiled):
            hidden, weight = (t.clone().requires_grad_() for t in arguments[:2])
            values = call(hidden, weight, *arguments[2:])
            values[0].backward()
            results.append([*(value.detach() for value in values), hidden.grad, weight.grad])
        torch.testing.assert_close(results[1], results[0])
    assert backend.graphs <= 2


@pytest.mark.parametrize("function", [policy, scores])
def test_rows_marked_as_dynamic_are_one_graph(function):
    backend = Backend()
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    for n in SIZES:
        hidden, weight, *rows = inputs(n)
        for tensor in (hidden, *rows):
            torch._dynamo.mark_dynamic(tensor, 0)
        compiled(hidden, weight.requires_grad_(), *rows)[0].backward()
    assert backend.graphs == 1


def test_export_with_any_number_of_rows():
    class Scored(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = FusedLMHead(D, V)

        def forward(self, hidden, target, advantage):
            return *self.head(hidden, target), self.head(hidden, target, advantage).loss

    def rows(n):
        return torch.randn(2, n, D), torch.randint(V, (2, n)), torch.randn(2, n)

    model, length = Scored(), torch.export.Dim("length", min=2, max=100)
    exported = torch.export.export(model, rows(8), dynamic_shapes=[{1: length}] * 3).module()
    for n in (8, 13):
        given = rows(n)
        torch.testing.assert_close(exported(*given), model(*given))


def test_a_patched_model_over_ten_lengths_is_two_graphs():
    model, backend = patch(tiny("qwen2", num_hidden_layers=1)), Backend()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        for length in range(6, 16):
            tokens, target = batch(2, length)
            options = dict(target=target, advantage=torch.randn(target.shape), temperature=1 + length / 10)
            loss = compiled(tokens, **options).loss
    torch.testing.assert_close(loss, model(tokens, **options).loss)
    assert backend.graphs <= 2


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
