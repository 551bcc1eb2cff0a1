import math

import pytest
import torch

from mssr.algorithms.shaping import sampled_token_entropy, shape


def test_both_branches_by_hand():
    advantage = torch.tensor([[1.0], [-1.0], [0.0]])
    entropy = torch.tensor([[0.5, 2.0]])
    # alpha H = 0.2 and 0.8; |A| / kappa = 0.5, 0.5 and 0: the smaller is added
    expected = torch.tensor([[1.2, 1.5], [-0.8, -0.5], [0.0, 0.0]])
    torch.testing.assert_close(shape(advantage, entropy, alpha=0.4, kappa=2.0), expected)


@pytest.mark.parametrize("kappa", [1.01, 2.0, 10.0])
def test_sign_is_kept_for_kappa_above_one(kappa):
    generator = torch.Generator().manual_seed(0)
    advantage = torch.randn(1000, 1, generator=generator)
    entropy = 10 * torch.rand(1, 20, generator=generator)
    shaped = shape(advantage, entropy, 0.4, kappa)
    assert torch.equal(shaped.sign(), advantage.sign().expand_as(shaped))
    assert (shaped >= advantage).all()


def test_kappa_below_one_can_flip_a_negative_advantage():
    # min(0.4 * 10, 1 / 0.5) = 2
    assert shape(torch.tensor(-1.0), torch.tensor(10.0), 0.4, 0.5).item() == 1.0


def test_alpha_zero_changes_nothing():
    advantage = torch.tensor([-2.0, 0.0, 3.0])
    assert torch.equal(shape(advantage, torch.ones(3), 0.0, 2.0), advantage)


def test_no_gradient_reaches_the_entropy():
    entropy = torch.tensor([0.5], requires_grad=True)
    assert not shape(torch.tensor([1.0]), entropy, 0.4, 2.0).requires_grad


def test_sampled_token_entropy_by_hand():
    # p = 1/2: log(2)/2 = 0.34657; p = 1/e: 1/e, the most there is; p = 1 and p = 0: 0
    logp = torch.tensor([math.log(0.5), -1.0, 0.0, -math.inf])
    expected = torch.tensor([0.346574, 0.367879, 0.0, 0.0])
    torch.testing.assert_close(sampled_token_entropy(logp), expected, atol=1e-6, rtol=0)


def test_sampled_token_entropy_is_at_most_one_over_e():
    assert sampled_token_entropy(torch.linspace(-200, 0, 10_001)).max().item() <= math.exp(-1) + 1e-7
