import pytest
import torch

from mssr.algorithms.advantages import batch_normalise


def test_by_hand_with_the_biased_variance():
    # mean 2, squares (1, 1, 1, 9), biased variance 12 / 4 = 3 (unbiased: 12 / 3 = 4)
    advantage = torch.tensor([1.0, 1.0, 1.0, 5.0])
    root3 = 3**0.5
    expected = torch.tensor([-1 / root3, -1 / root3, -1 / root3, 3 / root3])
    torch.testing.assert_close(batch_normalise(advantage), expected)


def test_two_rewards_become_minus_one_and_one():
    assert batch_normalise(torch.tensor([0.25, 0.75])).tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("value", [0.0, 0.1, -1 / 3, 1e-30])
@pytest.mark.parametrize("count", [1, 3, 7, 2047])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_advantages_become_exactly_zero(value, count, dtype):
    result = batch_normalise(torch.full((count,), value, dtype=dtype))
    assert result.dtype == dtype
    assert torch.equal(result, torch.zeros(count, dtype=dtype))


def test_no_sequences():
    assert batch_normalise(torch.empty(0)).shape == (0,)


def test_nan_is_not_hidden():
    assert batch_normalise(torch.tensor([0.0, float("nan"), 1.0])).isnan().all()


def test_mean_zero_and_variance_one_and_shift_and_scale_do_not_matter():
    advantage = torch.rand(512, generator=torch.Generator().manual_seed(0))
    result = batch_normalise(advantage)
    assert abs(result.mean().item()) < 1e-6
    assert abs(result.var(correction=0).item() - 1) < 1e-5
    torch.testing.assert_close(batch_normalise(3 * advantage - 7), result, atol=1e-5, rtol=1e-5)
