import pytest
import torch

from mssr.algorithms import make_algorithm
from mssr.algorithms.shaping import sampled_token_entropy, shape
from mssr.config import AlgorithmConfig
from mssr.errors import UserError
from mssr_kernels import PolicyLossConfig, linear_policy_loss


@pytest.mark.parametrize("name", ["mssr", "mvsr"])
def test_advantages_by_hand(name):
    # r - v = (0.5, -0.5, 0.25, -0.25): mean 0, biased variance (0.25 + 0.25 + 0.0625 + 0.0625) / 4 = 0.15625
    reward = torch.tensor([1.0, 0.0, 1.0, 0.0])
    baseline = torch.tensor([0.5, 0.5, 0.75, 0.25])
    expected = torch.tensor([0.5, -0.5, 0.25, -0.25]) / 0.15625**0.5
    advantage = make_algorithm(AlgorithmConfig(name=name)).advantages(reward, baseline)
    assert advantage.dtype == torch.float32
    torch.testing.assert_close(advantage, expected)


def test_loss_config_of_the_defaults():
    assert make_algorithm(AlgorithmConfig()).loss_config() == PolicyLossConfig(
        clip_low=0.2,
        clip_high=0.3,
        dual_clip=3.0,
        entropy_alpha=0.4,
        entropy_kappa=2.0,
        entropy_source="exact",
        kl_coef=0.01,
        kl_estimator="k3",
        entropy_coef=0.0,
        tis_cap=None,
    )


EVERYTHING = dict(
    entropy_alpha=0.1,
    entropy_kappa=4.0,
    entropy_source="sampled_token",
    clip_low=0.11,
    clip_high=0.12,
    dual_clip=None,
    kl_coef=0.13,
    entropy_coef=0.14,
    tis_cap=5.0,
)


def test_every_setting_reaches_the_loss():
    config = AlgorithmConfig(old_logp="recompute", **EVERYTHING)
    assert make_algorithm(config).loss_config() == PolicyLossConfig(**EVERYTHING)


def test_mvsr_is_mssr_without_shaping():
    config = AlgorithmConfig(name="mvsr", old_logp="recompute", **EVERYTHING)
    assert make_algorithm(config).loss_config() == PolicyLossConfig(**EVERYTHING | {"entropy_alpha": 0.0})


def test_no_importance_weight_on_top_of_the_rollouts_own_log_probs():
    assert make_algorithm(AlgorithmConfig(old_logp="rollout", tis_cap=2.0)).loss_config().tis_cap is None
    assert make_algorithm(AlgorithmConfig(old_logp="recompute", tis_cap=2.0)).loss_config().tis_cap == 2.0


def test_unknown_name_lists_the_known_ones():
    config = AlgorithmConfig().model_copy(update={"name": "ppo"})
    with pytest.raises(UserError, match="'ppo'.*mssr, mvsr"):
        make_algorithm(config)


@pytest.mark.parametrize("name, source", [("mssr", "exact"), ("mssr", "sampled_token"), ("mvsr", "exact")])
def test_the_fused_loss_shapes_advantages_as_shape_does(name, source):
    config = AlgorithmConfig(name=name, entropy_source=source, kl_coef=0.0)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(40, 8, generator=generator), torch.randn(11, 8, generator=generator)
    target = torch.randint(11, (40,), generator=generator)
    advantage = torch.randn(40, generator=generator).masked_fill(torch.arange(40) == 7, 0.0)
    log_p = (hidden @ weight.T).log_softmax(1)
    logp = log_p.gather(1, target[:, None])[:, 0]

    loss = linear_policy_loss(hidden, weight, target, advantage, logp, config=make_algorithm(config).loss_config())

    entropy = -(log_p.exp() * log_p).sum(1) if source == "exact" else sampled_token_entropy(logp)
    expected = shape(advantage, entropy, 0.4, 2.0) if name == "mssr" else advantage
    torch.testing.assert_close(loss.advantage, expected, atol=1e-5, rtol=1e-5)
