import pytest
import torch
from shaping_oracle import shape

from mssr.algorithms.advantages import ALGORITHMS, Outcomes, zero_variance
from mssr.config.algorithm_keys import AlgorithmConfig
from mssr.config.resolve import policy_loss
from mssr.observe.step import sampled_token_entropy
from mssr_kernels import PolicyLossConfig, linear_policy_loss

TRACKED = ("mssr", "mvsr", "spo")
UNTRACKED = ("grpo", "rloo", "reinforce_pp")
NAN = float("nan")


def advantages(name, reward, *, value=None, lengths=None, group=1, graded=None, success_weight=1.0):
    reward = torch.tensor(reward)
    lengths = torch.ones(len(reward), dtype=torch.int64) if lengths is None else torch.tensor(lengths)
    value = None if value is None else torch.tensor(value)
    graded = torch.ones(len(reward), dtype=torch.bool) if graded is None else torch.tensor(graded, dtype=torch.bool)
    result = ALGORITHMS[name].advantages(Outcomes(reward, reward, graded, value, lengths, group, success_weight))
    assert result.dtype == torch.float32 and result.shape == reward.shape
    return result


@pytest.mark.parametrize("name", TRACKED)
def test_tracked_advantages_by_hand(name):
    # r - v = (0.5, -0.5, 0.25, -0.25): mean 0, biased variance (0.25 + 0.25 + 0.0625 + 0.0625) / 4 = 0.15625
    expected = torch.tensor([0.5, -0.5, 0.25, -0.25]) / 0.15625**0.5
    result = advantages(name, [1.0, 0.0, 1.0, 0.0], value=[0.5, 0.5, 0.75, 0.25], lengths=[1, 9, 4, 2])
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("name", TRACKED)
def test_only_the_success_has_a_baseline(name):
    # reward = 2 * success + bonus, bonus (0, 0.5, 0, -0.5): r - 2 v = (1, -0.5, 0.5, -1), mean 0, variance 2.5 / 4 = 0.625
    expected = torch.tensor([1.0, -0.5, 0.5, -1.0]) / 0.625**0.5
    result = advantages(name, [2.0, 0.5, 2.0, -0.5], value=[0.5, 0.5, 0.75, 0.25], success_weight=2.0)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("name", TRACKED)
@pytest.mark.parametrize("reward", [0.0, 9.0, NAN])
def test_a_response_without_a_grade_does_not_move_the_others(name, reward):
    # The four of the test above, and two without a grade between them.
    expected = torch.tensor([0.5, 0.0, -0.5, 0.25, -0.25, 0.0]) / 0.15625**0.5
    result = advantages(
        name, [1.0, reward, 0.0, 1.0, 0.0, reward], value=[0.5, 0.9, 0.5, 0.75, 0.25, 0.1], graded=[1, 0, 1, 1, 1, 0]
    )
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("reward", [0.0, 1.0, NAN])
def test_groups_are_compared_over_their_graded_responses(reward):
    # Graded (1, 0, 0): mean 1/3, unbiased variance (4/9 + 1/9 + 1/9) / 2 = 1/3. Graded (1, 0): mean 1/2, variance 1/2.
    root3, root2 = 3**0.5, 2**0.5
    rewards, graded = [1.0, reward, 0.0, 0.0, reward, 1.0, reward, 0.0], [1, 0, 1, 1, 0, 1, 0, 1]
    expected = [2 / root3, 0.0, -1 / root3, -1 / root3, 0.0, root2 / 2, 0.0, -root2 / 2]
    result = advantages("grpo", rewards, group=4, graded=graded)
    torch.testing.assert_close(result, torch.tensor(expected), rtol=1e-5, atol=0)
    # RLOO: minus the mean of the other graded ones: 1 - 0, 0 - 1/2, 0 - 1/2; 1 - 0, 0 - 1
    expected = [1.0, 0.0, -0.5, -0.5, 0.0, 1.0, 0.0, -1.0]
    torch.testing.assert_close(advantages("rloo", rewards, group=4, graded=graded), torch.tensor(expected))
    # REINFORCE++ over graded tokens, one each: (1, 0, 0, 1, 0), mean 2/5, variance (2 * 9/25 + 3 * 4/25) / 4 = 3/10
    one, zero = 0.6 / 0.3**0.5, -0.4 / 0.3**0.5
    expected = torch.tensor([one, 0.0, zero, zero, 0.0, one, 0.0, zero])
    torch.testing.assert_close(advantages("reinforce_pp", rewards, group=4, graded=graded), expected)


@pytest.mark.parametrize("name", UNTRACKED)
@pytest.mark.parametrize("graded", [[0, 0, 0], [0, 1, 0]])
def test_one_graded_response_of_a_group_or_none_is_worth_nothing(name, graded):
    assert advantages(name, [0.0, 1.0, 0.0], group=3, graded=graded).tolist() == [0.0, 0.0, 0.0]


def test_grpo_by_hand():
    # 1 of 4 right: mean 1/4, unbiased variance (9/16 + 3/16) / 3 = 1/4; 2 of 4: mean 1/2, variance 4 * 1/4 / 3 = 1/3
    root3 = 3**0.5
    expected = torch.tensor([1.5, -0.5, -0.5, -0.5, root3 / 2, -root3 / 2, root3 / 2, -root3 / 2])
    result = advantages("grpo", [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0], group=4)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=0)


def test_grpo_has_the_authors_eps():
    # rewards 0 and d: std d / sqrt(2), so A = +-(d / 2) / (d / sqrt(2) + 1e-6); d = 1e-6: 0.5 / (0.7071 + 1)
    torch.testing.assert_close(advantages("grpo", [0.0, 1e-6], group=2), torch.tensor([-0.2928932, 0.2928932]))


def test_rloo_by_hand():
    # mean of the other responses: 0, 1/3, 1/3, 1/3
    expected = torch.tensor([1.0, -1 / 3, -1 / 3, -1 / 3])
    torch.testing.assert_close(advantages("rloo", [1.0, 0.0, 0.0, 0.0], group=4), expected)
    # group 3: 0.5 - 0.25, 0.5 - 0.25, 0 - 0.5; 1 - 0.5, 1 - 0.5, 0 - 1
    result = advantages("rloo", [0.5, 0.5, 0.0, 1.0, 1.0, 0.0], group=3)
    torch.testing.assert_close(result, torch.tensor([0.25, 0.25, -0.5, 0.5, 0.5, -1.0]))


def test_reinforce_pp_by_hand():
    # 4 tokens, returns (1, 0, 0, 0): mean 1/4, variance (9/16 + 3/16) / (4 - 1) = 1/4, A = (1.5, -0.5)
    torch.testing.assert_close(advantages("reinforce_pp", [1.0, 0.0], lengths=[1, 3]), torch.tensor([1.5, -0.5]))
    # A response without tokens does not count: 3 tokens, returns (1, 1, 0), mean 2/3, variance (2/9 + 4/9) / 2 = 1/3
    root3 = 3**0.5
    result = advantages("reinforce_pp", [1.0, 0.0, 0.5], lengths=[2, 1, 0])
    torch.testing.assert_close(result, torch.tensor([root3 / 3, -2 * root3 / 3, -root3 / 6]))


def test_reinforce_pp_has_the_authors_eps():
    # 2 tokens, returns 0 and d: variance d^2 / 2; d = 1e-4: 0.5e-4 / sqrt(0.5e-8 + 1e-8)
    expected = torch.tensor([-0.4082483, 0.4082483])
    torch.testing.assert_close(advantages("reinforce_pp", [0.0, 1e-4]), expected)


def test_reinforce_pp_is_whitened_over_tokens():
    generator = torch.Generator().manual_seed(0)
    reward = torch.rand(64, generator=generator)
    lengths = torch.randint(1, 50, (64,), generator=generator)
    tokens = reward.double().repeat_interleave(lengths)
    expected = ((reward - tokens.mean()) / tokens.std()).float()
    torch.testing.assert_close(advantages("reinforce_pp", reward.tolist(), lengths=lengths.tolist()), expected)


@pytest.mark.parametrize("name", UNTRACKED)
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3])
@pytest.mark.parametrize("group", [2, 3, 7])
def test_equal_rewards_are_worth_exactly_nothing(name, value, group):
    result = advantages(name, [value] * (3 * group), lengths=list(range(1, 3 * group + 1)), group=group)
    assert torch.equal(result, torch.zeros(3 * group))


@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_groups_do_not_see_each_other(name):
    alone = advantages(name, [1.0, 0.0, 0.25], group=3)
    beside = advantages(name, [0.7, 0.7, 0.7, 1.0, 0.0, 0.25], group=3)
    assert torch.equal(beside, torch.cat([torch.zeros(3), alone]))


@pytest.mark.parametrize("name", UNTRACKED)
def test_a_nan_reward_stays_visible(name):
    assert advantages(name, [1.0, NAN, 0.0], group=3).isnan().all()


@pytest.mark.parametrize("name", ["grpo", "rloo"])
@pytest.mark.parametrize("group", [1, 3])
def test_groups_must_be_whole_and_more_than_one_response(name, group):
    with pytest.raises(ValueError, match=f"4 responses in groups of {group}"):
        advantages(name, [1.0, 0.0, 1.0, 0.0], group=group)


def test_zero_variance_by_hand():
    reward = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.3, 0.3, NAN, NAN])
    expected = [True, True, True, True, False, False, True, True, False, False]
    assert zero_variance(reward, torch.ones(10, dtype=torch.bool), 2).tolist() == expected
    assert zero_variance(torch.tensor([1.0, 1.0, 0.0]), torch.ones(3, dtype=torch.bool), 3).tolist() == [False] * 3


def test_zero_variance_of_the_graded_responses():
    reward = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    graded = torch.tensor([0, 1, 1, 1, 1, 0, 0, 1, 0, 0, 0, 0], dtype=torch.bool)
    # (-, 1, 1), (0, 1, -), (-, 1, -), (-, -, -): only the second has rewards that differ
    assert zero_variance(reward, graded, 3).tolist() == [True] * 3 + [False] * 3 + [True] * 6


@pytest.mark.parametrize("name", TRACKED + UNTRACKED)
def test_who_has_a_baseline_from_the_tracker(name):
    assert ALGORITHMS[name].tracked is (name in TRACKED)


def test_loss_config_of_the_defaults():
    assert policy_loss(AlgorithmConfig()) == PolicyLossConfig(
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
    assert policy_loss(config) == PolicyLossConfig(**EVERYTHING)


@pytest.mark.parametrize("name", ["mvsr", "spo", *UNTRACKED])
def test_only_mssr_shapes(name):
    config = AlgorithmConfig(name=name, old_logp="recompute", **EVERYTHING)
    assert policy_loss(config) == PolicyLossConfig(**EVERYTHING | {"entropy_alpha": 0.0})


def test_no_importance_weight_on_top_of_the_rollouts_own_log_probs():
    assert policy_loss(AlgorithmConfig(old_logp="rollout", tis_cap=2.0)).tis_cap is None
    assert policy_loss(AlgorithmConfig(old_logp="recompute", tis_cap=2.0)).tis_cap == 2.0


@pytest.mark.parametrize("name, source", [("mssr", "exact"), ("mssr", "sampled_token"), ("mvsr", "exact")])
def test_the_fused_loss_shapes_advantages_as_shape_does(name, source):
    config = AlgorithmConfig(name=name, entropy_source=source, kl_coef=0.0)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(40, 8, generator=generator), torch.randn(11, 8, generator=generator)
    target = torch.randint(11, (40,), generator=generator)
    advantage = torch.randn(40, generator=generator).masked_fill(torch.arange(40) == 7, 0.0)
    log_p = (hidden @ weight.T).log_softmax(1)
    logp = log_p.gather(1, target[:, None])[:, 0]

    loss = linear_policy_loss(hidden, weight, target, advantage, logp, config=policy_loss(config))

    entropy = -(log_p.exp() * log_p).sum(1) if source == "exact" else sampled_token_entropy(logp)
    expected = shape(advantage, entropy, 0.4, 2.0) if name == "mssr" else advantage
    torch.testing.assert_close(loss.advantage, expected, atol=1e-5, rtol=1e-5)
