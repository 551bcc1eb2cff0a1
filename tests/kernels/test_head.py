"""FusedLMHead behaves as an nn.Linear, and as the loss functions when it is given targets."""

import copy
import typing

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


FORBIDDEN = [3, 49]


@pytest.mark.parametrize("biased", [False, True])
def test_forbidden_columns_are_out_of_the_distribution(biased):
    """The head equals one that never had these columns."""
    head, smaller = FusedLMHead(12, 50, bias=biased), nn.Linear(12, 48, bias=biased)
    kept = [column for column in range(50) if column not in FORBIDDEN]
    names, parameters = list(head.state_dict()), list(head.parameters())
    head.forbid(FORBIDDEN[:1])
    head.forbid(FORBIDDEN)
    assert list(head.state_dict()) == names and list(head.parameters()) == parameters
    smaller.load_state_dict({name: value[kept] for name, value in head.state_dict().items()})
    hidden, position = torch.randn(6, 12), torch.randint(48, (6,))
    target = torch.tensor(kept)[position]

    assert (head(hidden)[:, FORBIDDEN] == -torch.inf).all()
    torch.testing.assert_close(head(hidden)[:, kept], smaller(hidden))
    dist = torch.log_softmax(smaller(hidden), dim=1)
    out = head(hidden, target, temperature=1.0)
    torch.testing.assert_close(out.logp, dist.gather(1, position[:, None]).squeeze(1), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.entropy, -(dist.exp() * dist).sum(1), atol=1e-5, rtol=0)

    (out.logp.sum() + out.entropy.sum()).backward()
    gradients = [parameter.grad for parameter in head.parameters()]
    (dist.gather(1, position[:, None]).sum() - (dist.exp() * dist).sum()).backward()
    for found, parameter in zip(gradients, smaller.parameters(), strict=True):
        assert (found[FORBIDDEN] == 0).all()
        torch.testing.assert_close(found[kept], parameter.grad, atol=1e-5, rtol=0)


def test_forbidden_columns_in_the_policy_loss():
    head, hidden, target = FusedLMHead(12, 50, bias=False), torch.randn(6, 12), torch.randint(4, 49, (6,))
    head.forbid(FORBIDDEN)
    out = head(hidden, target, torch.randn(6), old_logp=-4 * torch.ones(6))
    assert torch.equal(out.logp, head(hidden, target).logp)
    out.loss.backward()
    assert out.loss.isfinite() and head.weight.grad.isfinite().all() and (head.weight.grad[FORBIDDEN] == 0).all()


def test_what_is_forbidden_follows_the_head():
    head, hidden, target = FusedLMHead(12, 50), torch.randn(6, 12), torch.randint(4, 49, (6,))
    head.forbid(FORBIDDEN)
    for other in (copy.deepcopy(head), FusedLMHead.from_linear(head)):
        assert torch.equal(other(hidden, target).logp, head(hidden, target).logp)
    assert (head(hidden, torch.full((6,), 3)).logp == -torch.inf).all()
    again = FusedLMHead(12, 50)
    again.load_state_dict(head.state_dict())
    assert again(hidden).isfinite().all()
    for dtype in (torch.bfloat16, torch.float64):
        head.to(dtype)
        assert head(hidden.to(dtype)).dtype == dtype and head(hidden.to(dtype), target).logp.isfinite().all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head.float()(hidden, target).logp.isfinite().all()
    by_hand = head.half()
    by_hand.weight.data, by_hand.bias.data = by_hand.weight.data.float(), by_hand.bias.data.float()
    assert by_hand(hidden).dtype == torch.float32 and by_hand(hidden, target).logp.isfinite().all()


def test_what_is_forbidden_survives_to_empty():
    """A head made on the meta device gets its weights later."""
    real = FusedLMHead(12, 50)
    with torch.device("meta"):
        head = FusedLMHead(12, 50)
    head.forbid(FORBIDDEN)
    converted = FusedLMHead.from_linear(copy.deepcopy(head)).to(torch.bfloat16)
    for late in (head.to_empty(device="cpu"), converted.to_empty(device="cpu").float()):
        late.load_state_dict(real.state_dict())
        hidden = torch.randn(3, 12)
        kept = [column for column in range(50) if column not in FORBIDDEN]
        assert (late(hidden)[:, FORBIDDEN] == -torch.inf).all()
        assert torch.equal(late(hidden)[:, kept], real(hidden)[:, kept])


def test_a_head_made_from_another_forbids_for_itself():
    first = FusedLMHead(12, 50)
    first.forbid([1])
    second = FusedLMHead.from_linear(first)
    second.forbid([2])
    hidden = torch.randn(3, 12)
    for _ in range(2):
        assert (first(hidden) == -torch.inf)[0].nonzero().flatten().tolist() == [1]
        assert (second(hidden) == -torch.inf)[0].nonzero().flatten().tolist() == [1, 2]
        first.float()


def test_from_linear_keeps_hooks():
    model, calls = Model(), []
    kept = [
        model.lm_head.register_forward_hook(lambda module, inputs, output: calls.append("forward")),
        model.lm_head.register_forward_pre_hook(lambda module, args, kwargs: calls.append("before"), with_kwargs=True),
        model.lm_head.register_full_backward_hook(lambda module, before, after: calls.append("backward")),
        model.lm_head.register_state_dict_post_hook(lambda *arguments: calls.append("state")),
    ]
    by_conversion(model)
    model(torch.randint(50, (2, 5))).sum().backward()
    model.state_dict()
    assert calls == ["before", "forward", "backward", "state"]
    for handle in kept:
        handle.remove()
    model(torch.randint(50, (2, 5))).sum().backward()
    assert len(calls) == 4


def test_typed_overloads_say_what_forward_takes_and_returns():
    """The options have the types of the functions' arguments; the bias is the head's own."""
    plain, scores, loss = typing.get_overloads(FusedLMHead.forward)
    assert typing.get_type_hints(plain)["return"] is torch.Tensor
    named = {"hidden", "weight", "target", "advantage", "bias"}
    for overload, function in ((scores, linear_logprob_entropy), (loss, linear_policy_loss)):
        hints, wanted = typing.get_type_hints(overload), typing.get_type_hints(function)
        assert hints["return"] is wanted.pop("return")
        (options,) = typing.get_args(hints["options"])
        assert typing.get_type_hints(options) == {name: kind for name, kind in wanted.items() if name not in named}


def test_errors():
    head = FusedLMHead(12, 50)
    with pytest.raises(ValueError, match="got advantage, temperature but no target"):
        head(torch.randn(3, 12), advantage=torch.randn(3), temperature=2.0)
    with pytest.raises(ValueError, match=r"hidden is \[2, 3, 12\] but target is \[6\]"):
        head(torch.randn(2, 3, 12), torch.zeros(6, dtype=torch.long))
    hidden, target = torch.randn(2, 3, 12), torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"^advantage is \[2\] but target is \[2, 3\]: expand it to target's shape$"):
        head(hidden, target, torch.zeros(2))
    with pytest.raises(ValueError, match=r"^old_logp is \[6\] but target is \[2, 3\]: expand"):
        head(hidden, target, torch.zeros(2, 3), old_logp=torch.zeros(6))
    with pytest.raises(TypeError, match="needs an nn.Linear, got Embedding"):
        FusedLMHead.from_linear(nn.Embedding(3, 4))
    with pytest.raises(IndexError, match=r"forbid got token 50: outside \[0, 50\)"):
        head.forbid([3, 50])
    head.forbid([3])
    with pytest.raises(ValueError, match="drop softcap or forbid"):
        head(torch.randn(3, 12), torch.zeros(3, dtype=torch.long), softcap=30.0)
