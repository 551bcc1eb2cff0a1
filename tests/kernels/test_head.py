"""FusedLMHead is an nn.Linear in every respect, and the functions when it is given targets."""

import copy

import pytest
import torch
from torch import nn

from mssr_kernels import FusedLMHead, LogprobEntropy, PolicyLoss, linear_logprob_entropy, linear_policy_loss


class Model(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.embed = nn.Embedding(50, 12)
        self.lm_head = nn.Linear(12, 50, bias=not tied)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, tokens, *arguments, **keywords):
        return self.lm_head(self.embed(tokens).tanh(), *arguments, **keywords)


def by_conversion(model):
    model.lm_head = FusedLMHead.from_linear(model.lm_head)


def by_class(model):
    model.lm_head.__class__ = FusedLMHead


@pytest.mark.parametrize("swap", [by_conversion, by_class])
@pytest.mark.parametrize("tied", [False, True])
def test_swap_keeps_names_parameters_ties_and_logits(swap, tied):
    model = Model(tied).eval()
    before, names = dict(model.named_parameters()), list(model.state_dict())
    tokens = torch.randint(50, (2, 5))
    logits = model(tokens)
    swap(model)
    assert list(model.state_dict()) == names and "lm_head.weight" in names
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert (model.lm_head.weight is model.embed.weight) is tied
    assert isinstance(model.lm_head, FusedLMHead) and not model.lm_head.training
    assert (model.lm_head.in_features, model.lm_head.out_features) == (12, 50)
    assert torch.equal(model(tokens), logits)
    again = copy.deepcopy(model)
    again.load_state_dict(model.state_dict())
    assert (again.lm_head.weight is again.embed.weight) is tied


@pytest.mark.parametrize("leading", [(6,), (2, 3)])
def test_with_targets_it_is_the_functions(leading):
    head = FusedLMHead(12, 50)
    hidden, target, advantage = torch.randn(*leading, 12), torch.randint(50, leading), torch.randn(leading)
    flat = hidden.reshape(-1, 12), head.weight, target.reshape(-1)

    out = head(hidden, target, temperature=0.5)
    assert isinstance(out, LogprobEntropy)
    for a, b in zip(out, linear_logprob_entropy(*flat, bias=head.bias, temperature=0.5)):
        assert torch.equal(a, b)

    out = head(hidden, target, advantage, old_logp=-torch.ones(leading), normalizer=torch.tensor(9.0))
    assert isinstance(out, PolicyLoss) and out.logp.shape == (6,)
    expected = linear_policy_loss(*flat, advantage.reshape(-1), -torch.ones(6), bias=head.bias, normalizer=9.0)
    assert torch.equal(out.loss, expected.loss)


def test_tied_weight_collects_both_gradients():
    model = Model(tied=True)
    by_class(model)
    tokens, target = torch.randint(50, (7,)), torch.randint(50, (7,))
    model(tokens, target).logp.sum().backward()
    fused, model.embed.weight.grad = model.embed.weight.grad, None
    torch.log_softmax(model(tokens), 1).gather(1, target[:, None]).sum().backward()
    torch.testing.assert_close(fused, model.embed.weight.grad, rtol=1e-4, atol=1e-6)


def test_accumulation_over_micro_batches():
    head = FusedLMHead(12, 50)
    hidden, target, advantage = torch.randn(8, 12), torch.randint(50, (8,)), torch.randn(8)
    head(hidden, target, advantage).loss.backward()
    whole = head.weight.grad.clone(), head.bias.grad.clone()
    head.zero_grad()
    for rows in (slice(0, 3), slice(3, 8)):
        head(hidden[rows], target[rows], advantage[rows], normalizer=8.0).loss.backward()
    torch.testing.assert_close((head.weight.grad, head.bias.grad), whole, rtol=1e-4, atol=1e-7)


def test_errors():
    head = FusedLMHead(12, 50)
    with pytest.raises(ValueError, match="got advantage, temperature but no target"):
        head(torch.randn(3, 12), advantage=torch.randn(3), temperature=2.0)
    with pytest.raises(ValueError, match=r"hidden is \[2, 3, 12\] but target is \[6\]"):
        head(torch.randn(2, 3, 12), torch.zeros(6, dtype=torch.long))
    with pytest.raises(ValueError, match=r"per-row argument is \[6\] but target is \[2, 3\]"):
        head(torch.randn(2, 3, 12), torch.zeros(2, 3, dtype=torch.long), torch.zeros(6))
    with pytest.raises(TypeError, match="needs an nn.Linear, got Embedding"):
        FusedLMHead.from_linear(nn.Embedding(3, 4))
