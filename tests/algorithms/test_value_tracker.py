import pytest
import torch

from mssr.algorithms.value_tracker import (
    KL_WINDOW,
    PreviousResponse,
    ValueTracker,
    beta_update,
    beta_value,
    reference_kl,
    reference_rho,
    response_drift,
    rho_from_drift,
    smoothed_start,
)
from mssr.config.algorithm_keys import TrackerConfig
from mssr.errors import UserError

NAN = float("nan")


def reference_tracker() -> ValueTracker:
    return ValueTracker(TrackerConfig(preset="reference"))


def response(*logp: float) -> PreviousResponse:
    return PreviousResponse(torch.arange(len(logp)), torch.tensor(logp))


# Beta(a, b)


def test_value_by_hand():
    assert beta_value(3.0, 1.0) == 0.75
    assert beta_value(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 1.0])).tolist() == [0.75, 0.5]


def test_update_by_hand():
    # 0.5 * (4, 2) = (2, 1), then the reward is added
    assert beta_update(4.0, 2.0, 1.0, 0.5) == (3.0, 1.0)
    assert beta_update(4.0, 2.0, 0.0, 0.5) == (2.0, 2.0)
    assert beta_update(4.0, 2.0, 0.25, 0.5) == (2.25, 1.75)


def test_smoothed_start_by_hand():
    assert smoothed_start(0, 0, 8.0) == (4.0, 4.0)
    assert smoothed_start(1, 1, 8.0) == (6.0, 2.0)  # 8 * 1.5 / 2, 8 * 0.5 / 2
    assert smoothed_start(0, 1, 8.0) == (2.0, 6.0)
    assert smoothed_start(2, 3, 8.0) == (5.0, 3.0)  # 8 * 2.5 / 4, 8 * 1.5 / 4


def test_memory_of_n0_visits_is_the_fixed_point_of_the_strongest_forgetting():
    a, b = smoothed_start(1, 1, 8.0)
    for reward in (1.0, 0.0, 0.0, 1.0):
        a, b = beta_update(a, b, reward, 0.875)
        assert a + b == 8.0


@pytest.mark.parametrize("rho, failures", [(0.875, 6), (0.96, 7)])
def test_a_value_of_exactly_one_is_slow_to_fall(rho, failures):
    # rho .875: v = .875^k, .513 at k = 5, .449 at 6. rho .96: 8x / (25 - 17x), x = .96^k: .521 at 6, .477 at 7
    a, b = 8.0, 0.0
    values = []
    for _ in range(failures):
        a, b = beta_update(a, b, 0.0, rho)
        values.append(beta_value(a, b))
    assert values[-2] > 0.5 > values[-1]


# rho


def test_rho_from_drift_by_hand():
    # half-life 0.06: D = 0 -> 1, 0.0006 -> 2^-0.01 = 0.993 (both clipped), 0.006 -> 2^-0.1, 0.06 -> 1/2 (clipped)
    rho = rho_from_drift(torch.tensor([0.0, 0.0006, 0.006, 0.06]), 0.06, 0.875, 0.96)
    expected = torch.tensor([0.96, 0.96, 0.9330330, 0.875], dtype=torch.float64)
    torch.testing.assert_close(rho, expected, atol=1e-6, rtol=0)


def test_half_life_halves_the_memory():
    torch.testing.assert_close(rho_from_drift(torch.tensor(0.3), 0.3, 0.01, 0.99).item(), 0.5)


def test_more_drift_never_means_less_forgetting():
    rho = rho_from_drift(torch.linspace(0, 0.1, 1001), 0.06, 0.875, 0.96)
    assert (rho.diff() <= 0).all()
    assert rho[0] == 0.96 and rho[-1] == 0.875


@pytest.mark.parametrize(
    "kl, rho", [(0.0, 0.875), (0.005, 0.9175), (0.0099, 0.95915), (0.01, 0.96), (0.0101, 0.875), (1.0, 0.875)]
)
def test_reference_rho_is_the_authors_sawtooth(kl, rho):
    # 0.875 + 0.085 * kl / 0.01 up to and including 0.01
    assert reference_rho(kl, 0.875, 0.96).item() == pytest.approx(rho, abs=1e-12)


def test_drift_by_hand():
    current = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, -1.0]])
    sampled = torch.tensor([[-1.5, -1.0, -3.0], [-1.0, -1.5, -1.0]])
    # (0.5 + 1 + 0) / 3 and (0 + 0.5) / 2: absolute differences, divided by the row's own number of tokens
    mask = torch.tensor([[True, True, True], [True, True, False]])
    torch.testing.assert_close(response_drift(current, sampled, mask), torch.tensor([0.5, 0.25]))


@pytest.mark.parametrize("stray", [100.0, NAN, float("-inf")])
def test_what_lies_outside_the_mask_does_not_leak_in(stray):
    current = torch.tensor([[-1.0, stray], [stray, stray]])
    mask = torch.tensor([[True, False], [False, False]])
    drift = response_drift(current, torch.full((2, 2), -1.25), mask)
    assert drift.tolist() == [0.25, 0.0]


def test_reference_kl_by_hand():
    old = torch.tensor([[-1.0, -2.0, -1.0], [-1.0, -30.0, -1.0], [NAN, NAN, NAN]])
    ref = torch.tensor([[-1.0, -1.0, -3.0], [-2.0, -1.0, -42.0], [0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])
    # d = 0, 1: (0 + e - 2) / 2; d = -1, 29, -41: (1 / e + 10 + 10) / 3, two clamped to 10; no tokens: 0
    expected = torch.tensor([0.3591409, 6.7892931, 0.0])
    torch.testing.assert_close(reference_kl(old, ref, mask), expected)


# The tracker


def test_unseen_prompts_start_at_a_half():
    for tracker in (ValueTracker(TrackerConfig()), reference_tracker()):
        values = tracker.values(["a", "b"])
        assert values.dtype == torch.float32
        assert values.tolist() == [0.5, 0.5]
    assert ValueTracker(TrackerConfig()).values([]).shape == (0,)


def test_a_sequence_of_visits_by_hand():
    tracker = ValueTracker(TrackerConfig())
    # (4, 4) -> 0.875: (4.5, 3.5) -> 0.5: (2.25, 2.75) -> 0.5: (2.125, 1.375)
    tracker.update(["a"], torch.tensor([1.0]), 0.875)
    assert tracker.values(["a"]).item() == 4.5 / 8
    tracker.update(["a"], torch.tensor([0.0]), 0.5)
    assert tracker.values(["a"]).item() == pytest.approx(2.25 / 5)
    tracker.update(["a"], torch.tensor([1.0]), torch.tensor([0.5]))
    assert tracker.values(["a"]).item() == pytest.approx(2.125 / 3.5)
    assert tracker.values(["b"]).item() == 0.5


def test_every_row_has_its_own_rho():
    tracker = ValueTracker(TrackerConfig())
    tracker.update(["a", "b"], torch.tensor([1.0, 1.0]), torch.tensor([0.5, 0.75]))
    # (2 + 1) / 5, (3 + 1) / 7
    torch.testing.assert_close(tracker.values(["b", "a"]), torch.tensor([4 / 7, 3 / 5]))


def test_a_key_twice_in_a_batch_is_updated_twice_in_order():
    tracker = ValueTracker(TrackerConfig())
    tracker.initialise(["a", "b"], torch.tensor([1.0, 0.0]))
    tracker.update(["a", "b", "a"], torch.tensor([1.0, 1.0, 0.0]), 0.5)
    # a: (6, 2) -> (4, 1) -> (2, 1.5), in the other order (3, 2) -> (2.5, 1); b: (2, 6) -> (2, 3)
    torch.testing.assert_close(tracker.values(["a", "b"]), torch.tensor([2 / 3.5, 0.4]))


def test_initialise_smooths_by_default():
    tracker = ValueTracker(TrackerConfig())
    tracker.initialise(["a", "b", "a", "c", "a"], torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0]))
    # a: 2 of 3 -> 2.5 / 4; b: 1 of 1 -> 1.5 / 2; c: 0 of 1 -> 0.5 / 2
    torch.testing.assert_close(tracker.values(["a", "b", "c"]), torch.tensor([0.625, 0.75, 0.25]))
    tracker.update(["b"], torch.tensor([0.0]), 0.875)
    assert tracker.values(["b"]).item() == 5.25 / 8  # (6, 2) * 0.875 = (5.25, 1.75), + (0, 1): N0 is 8


def test_initialise_in_the_reference_preset_is_exact():
    tracker = reference_tracker()
    tracker.initialise(["a", "b", "c", "c", "c", "c"], torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 0.0]))
    assert tracker.values(["a", "b", "c"]).tolist() == [1.0, 0.0, 0.25]
    tracker.update(["a", "b", "d"], torch.tensor([0.0, 1.0, 1.0]), 0.875)
    # (8, 0) -> (7, 1); (0, 8) -> (1, 7); unseen (4, 4) -> (4.5, 3.5)
    assert tracker.values(["a", "b", "d"]).tolist() == [0.875, 0.125, 0.5625]


def test_the_reference_preset_counts_rewards_as_right_or_wrong():
    tracker = reference_tracker()
    tracker.update(["a", "b", "c"], torch.tensor([0.5, 0.51, 1.0]), 0.875)
    assert tracker.values(["a", "b", "c"]).tolist() == [3.5 / 8, 4.5 / 8, 4.5 / 8]
    default = ValueTracker(TrackerConfig())
    default.update(["a"], torch.tensor([0.75]), 0.875)
    assert default.values(["a"]).item() == 4.25 / 8


def test_initialise_replaces_what_was_known():
    tracker = ValueTracker(TrackerConfig())
    for _ in range(2):
        tracker.initialise(["a"], torch.tensor([1.0]))
    assert tracker.values(["a"]).item() == 0.75


def test_rho_of_the_default_preset():
    tracker = ValueTracker(TrackerConfig())
    drift = torch.tensor([0.0, 0.006, 1.0])
    torch.testing.assert_close(
        tracker.rho(drift), torch.tensor([0.96, 0.9330330, 0.875], dtype=torch.float64), atol=1e-6, rtol=0
    )
    assert tracker.rho(None).item() == 0.96
    tracker.observe_kl(0.5)
    assert tracker.rho(torch.tensor(0.0)).item() == 0.96  # depends on the drift (here the batch's mean), not on the KL


def test_rho_of_the_reference_preset_follows_the_mean_of_recent_kls():
    tracker = reference_tracker()
    assert tracker.rho(torch.tensor([5.0])).item() == pytest.approx(0.9175)  # midpoint before the first KL
    tracker.observe_kl(0.0)
    assert tracker.rho(None).item() == 0.875
    tracker = reference_tracker()
    tracker.observe_kl(0.002)
    tracker.observe_kl(0.008)
    assert tracker.rho(None).item() == pytest.approx(0.9175)
    for _ in range(KL_WINDOW - 1):
        tracker.observe_kl(0.008)
    # the 0.002 has left the window: 0.875 + 0.085 * 0.8
    assert tracker.rho(None).item() == pytest.approx(0.943)
    tracker.observe_kl(1.0)
    assert tracker.rho(None).item() == 0.875


def test_reward_of_a_visit_does_not_change_the_value_read_before_it():
    tracker = ValueTracker(TrackerConfig())
    baseline = tracker.values(["a"])
    tracker.update(["a"], torch.tensor([1.0]), 0.875)
    assert baseline.item() == 0.5


@pytest.mark.parametrize("reward", [1.5, -0.1, NAN, float("inf")])
@pytest.mark.parametrize("method", ["update", "initialise"])
def test_a_reward_outside_zero_to_one_is_refused_and_changes_nothing(reward, method):
    tracker = ValueTracker(TrackerConfig())
    arguments = (["a", "bad-key"], torch.tensor([1.0, reward], dtype=torch.float64))
    with pytest.raises(UserError, match=f"bad-key: reward {reward}"):
        tracker.update(*arguments, 0.875) if method == "update" else tracker.initialise(*arguments)
    assert tracker.values(["a", "bad-key"]).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("rho", [NAN, 0.0, 1.01])
def test_a_rho_that_is_none_changes_nothing(rho):
    tracker = ValueTracker(TrackerConfig())
    with pytest.raises(ValueError, match="rho"):
        tracker.update(["a", "b"], torch.ones(2), torch.tensor([0.9, rho]))
    assert tracker.values(["a", "b"]).tolist() == [0.5, 0.5]


def test_as_many_rewards_as_keys():
    with pytest.raises(ValueError, match="2 keys"):
        ValueTracker(TrackerConfig()).update(["a", "b"], torch.ones(3), 0.9)


# Previous responses


def test_the_last_response_is_remembered_compactly():
    tracker = ValueTracker(TrackerConfig())
    assert tracker.previous("a") is None
    batch = torch.tensor([[5, 6, 7, 0], [151_935, 9, 0, 0]])
    logp = torch.tensor([[-0.1, -0.2, -0.3, 0.0], [-1.0, -2.0, 0.0, 0.0]])
    rows = [PreviousResponse(batch[0, :3], logp[0, :3]), PreviousResponse(batch[1, :2], logp[1, :2])]
    tracker.remember(["a", "b"], rows)
    kept = tracker.previous("b")
    assert kept.token_ids.tolist() == [151_935, 9] and kept.logp.tolist() == [-1.0, -2.0]
    assert kept.token_ids.dtype == torch.int32 and kept.logp.dtype == torch.float32
    assert kept.token_ids.untyped_storage().nbytes() == 8  # own storage, not the batch's
    logp.zero_()
    torch.testing.assert_close(tracker.previous("a").logp, torch.tensor([-0.1, -0.2, -0.3]))
    tracker.remember(["a"], [response(-4.0)])
    assert tracker.previous("a").logp.tolist() == [-4.0]


def test_as_many_log_probs_as_tokens():
    with pytest.raises(ValueError, match="prompt a"):
        ValueTracker(TrackerConfig()).remember(["a"], [PreviousResponse(torch.arange(3), torch.zeros(2))])


@pytest.mark.parametrize(
    "preset, drift, wanted", [("default", "prompt", True), ("default", "batch", False), ("reference", "prompt", False)]
)
def test_responses_are_wanted_only_where_rho_uses_them(preset, drift, wanted):
    assert ValueTracker(TrackerConfig(preset=preset, drift=drift)).wants_responses is wanted


# Saving and loading


def saved_and_loaded(tracker: ValueTracker, path) -> ValueTracker:
    torch.save(tracker.state_dict(), path)
    loaded = ValueTracker(tracker.config)
    loaded.load_state_dict(torch.load(path, weights_only=True))
    return loaded


@pytest.mark.parametrize("preset", ["default", "reference"])
def test_a_loaded_tracker_goes_on_bit_for_bit(preset, tmp_path):
    generator = torch.Generator().manual_seed(0)
    keys = [f"{row % 37:064x}" for row in range(200)]
    tracker = ValueTracker(TrackerConfig(preset=preset))
    tracker.initialise(keys, torch.rand(200, generator=generator))
    tracker.update(keys[:50], torch.rand(50, generator=generator), 0.9 + 0.05 * torch.rand(50, generator=generator))
    tracker.remember(["b", "a", "empty"], [response(-0.1, -0.2), response(-1 / 3), response()])
    for kl in range(KL_WINDOW + 2):
        tracker.observe_kl(kl / 3000)

    loaded = saved_and_loaded(tracker, tmp_path / "tracker.pt")

    before, after = tracker.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]) if isinstance(value, torch.Tensor) else value == after[name], name
    for each in (tracker, loaded):
        each.update(keys, torch.ones(200), each.rho(torch.full((200,), 0.005) if preset == "default" else None))
        each.observe_kl(0.001)
    assert torch.equal(tracker.state_dict()["beta"], loaded.state_dict()["beta"])
    assert tracker.rho(None) == loaded.rho(None)
    assert loaded.previous("a").logp.tolist() == tracker.previous("a").logp.tolist()
    for kept in loaded.previous("a"):
        assert kept.untyped_storage().nbytes() == 4  # own storage, not the checkpoint's
    assert loaded.previous("empty").token_ids.shape == (0,)


def test_an_empty_tracker_is_saved_too(tmp_path):
    loaded = saved_and_loaded(ValueTracker(TrackerConfig()), tmp_path / "tracker.pt")
    assert loaded.values(["a"]).item() == 0.5 and loaded.previous("a") is None


def test_loading_replaces_what_was_there():
    tracker, empty = ValueTracker(TrackerConfig()), ValueTracker(TrackerConfig())
    tracker.update(["a"], torch.ones(1), 0.9)
    tracker.remember(["a"], [response(-1.0)])
    tracker.load_state_dict(empty.state_dict())
    assert tracker.values(["a"]).item() == 0.5 and tracker.previous("a") is None


@pytest.mark.parametrize("other", [TrackerConfig(preset="reference"), TrackerConfig(rho_min=0.9)])
def test_a_state_of_another_preset_or_n0_is_refused(other):
    tracker = ValueTracker(TrackerConfig())
    tracker.update(["a"], torch.ones(1), 0.9)
    with pytest.raises(UserError, match="preset default and N0 8.*rho_min"):
        ValueTracker(other).load_state_dict(tracker.state_dict())
