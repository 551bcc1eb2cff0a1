"""Calibration of the value tracker: Brier score and bins, against hand-worked numbers."""

import pytest
import torch

from mssr.observe.step import calibration


def test_brier_and_bins_by_hand():
    metrics = calibration(torch.tensor([0.25, 0.28, 0.75, 0.0]), torch.tensor([1.0, 0.0, 1.0, 0.0]))
    # (0.5625 + 0.0784 + 0.0625 + 0) / 4
    assert metrics["tracker/brier"] == pytest.approx(0.17585)
    bins = metrics["tracker/bins"]
    assert len(bins) == 10
    assert bins[0] == [1, 0, 0]
    assert bins[2] == pytest.approx([2, 0.53, 1])
    assert bins[7] == pytest.approx([1, 0.75, 1])
    assert all(bins[index] == [0, 0, 0] for index in (1, 3, 4, 5, 6, 8, 9))


def test_a_bin_begins_with_its_lower_edge_and_the_last_holds_one():
    edges = torch.arange(11) / 10
    counts = [row[0] for row in calibration(edges, torch.zeros(11))["tracker/bins"]]
    assert counts == [1] * 9 + [2]


def test_half_of_everything_has_a_brier_of_a_quarter():
    assert calibration(torch.full((4,), 0.5), torch.tensor([1.0, 0.0, 0.0, 1.0]))["tracker/brier"] == 0.25


def test_bins_of_steps_add_up():
    generator = torch.Generator().manual_seed(0)
    baseline, reward = torch.rand(64, generator=generator), torch.rand(64, generator=generator)
    parts = [torch.tensor(calibration(*part)["tracker/bins"]) for part in zip(baseline.split(16), reward.split(16))]
    torch.testing.assert_close(sum(parts), torch.tensor(calibration(baseline, reward)["tracker/bins"]))
