import math

import matplotlib
import pytest
from PIL import Image

from mssr.errors import UserError
from mssr.observe.metrics import MetricsLog
from mssr.observe.plots import COLOURS, plot_curves


def record(run_dir, steps, **more):
    log = MetricsLog(run_dir)
    for step in range(1, steps + 1):
        values = {
            "train/correct": 0.4 + 0.3 * step / steps,
            "policy/entropy": 0.3 / step,
            "policy/entropy_proxy": 0.1 / step,
            "policy/clip_fraction": 0.01,
            "rollout/response_tokens": 20.0 + step % 3,
            "rollout/logp_gap_mean": 1e-6 * step,
            "train/grad_norm": 1.0 + step % 2,
            "tracker/value_mean": 0.4,
        }
        if step % 5 == 1:
            values["val/accuracy"] = 0.5
        log.write(step, values | more)
    log.close()
    return log.path


def colours(png):
    """Return colour -> number of pixels."""
    with Image.open(png) as image:
        assert image.format == "PNG"
        return {colour: count for count, colour in image.convert("RGB").getcolors(maxcolors=2**24)}


def pixels(png, colour):
    return colours(png).get(tuple(bytes.fromhex(colour[1:])), 0)


def test_a_run_becomes_a_png_with_all_its_panels(tmp_path):
    out = plot_curves({"demo": record(tmp_path / "a", 40)}, tmp_path / "deep" / "curves.png")
    assert out == tmp_path / "deep" / "curves.png"
    with Image.open(out) as image:
        assert image.width > 2000 and image.height > 900
    assert len(colours(out)) > 200
    assert pixels(out, COLOURS[0]) > 2000 and pixels(out, COLOURS[1]) > 1000
    assert pixels(out, COLOURS[2]) == 0  # with one run each metric of a panel has its colour; at most two share a panel


def test_runs_are_told_apart_by_colour(tmp_path):
    runs = {name: record(tmp_path / name, 30, **{"tracker/value_mean": 0.1 * n}) for n, name in enumerate("abc")}
    out = plot_curves(runs, tmp_path / "curves.png")
    assert all(pixels(out, colour) > 300 for colour in COLOURS[:3])
    assert pixels(out, COLOURS[3]) == 0


def test_the_parts_of_a_reward_share_a_panel_with_their_sum(tmp_path):
    reward = {"train/reward": 0.7, "reward/accuracy": 0.5, "reward/errors": 3.0}
    one = plot_curves({"one": record(tmp_path / "a", 30, **reward)}, tmp_path / "one.png")
    assert pixels(one, COLOURS[2]) == 0  # a single part is the reward
    two = plot_curves({"two": record(tmp_path / "b", 30, **reward, **{"reward/short": 0.2})}, tmp_path / "two.png")
    assert pixels(two, COLOURS[2]) > 300 and pixels(two, COLOURS[3]) == 0


def record_norms(run_dir, norms):
    log = MetricsLog(run_dir)
    for step, norm in enumerate(norms, start=1):
        log.write(step, {"train/grad_norm": norm})
    log.close()
    return log.path


def test_a_run_of_one_step_shows_its_point(tmp_path):
    out = plot_curves({"short": record_norms(tmp_path, [1.0])}, tmp_path / "curves.png")
    assert pixels(out, COLOURS[0]) > 30  # there is no legend: the only blue is the point


def test_one_nan_does_not_erase_the_rest_of_a_smoothed_curve(tmp_path):
    norms = [1.0 + step % 2 for step in range(40)]
    whole = plot_curves({"run": record_norms(tmp_path / "a", norms)}, tmp_path / "a.png")
    holed = plot_curves({"run": record_norms(tmp_path / "b", [*norms[:3], math.nan, *norms[4:]])}, tmp_path / "b.png")
    assert pixels(holed, COLOURS[0]) > 0.8 * pixels(whole, COLOURS[0])


def test_panels_without_data_are_left_out(tmp_path):
    log = MetricsLog(tmp_path)
    log.write(1, {"sft/loss": 2.0, "unknown/metric": 1.0})
    log.write(2, {"sft/loss": 1.0})
    log.close()
    out = plot_curves({"sft": log.path}, tmp_path / "curves.png")
    full = plot_curves({"rl": record(tmp_path / "rl", 5)}, tmp_path / "full.png")
    with Image.open(out) as small, Image.open(full) as large:
        assert small.width < large.width / 2


@pytest.mark.parametrize("gap", [0.0, math.nan])
def test_an_exact_or_unknown_gap_is_plotted_without_a_warning(tmp_path, gap, recwarn):
    plot_curves({"demo": record(tmp_path / "a", 3, **{"rollout/logp_gap_mean": gap})}, tmp_path / "curves.png")
    assert not [str(warning.message) for warning in recwarn]


def test_plotting_leaves_matplotlib_as_it_was(tmp_path):
    before = dict(matplotlib.rcParams)
    plot_curves({"demo": record(tmp_path / "a", 3)}, tmp_path / "curves.png")
    assert dict(matplotlib.rcParams) == before


def test_nothing_to_plot_is_said_in_one_line(tmp_path):
    MetricsLog(tmp_path).close()
    with pytest.raises(UserError, match="nothing to plot"):
        plot_curves({"demo": tmp_path / "metrics.jsonl"}, tmp_path / "curves.png")
    with pytest.raises(UserError, match="no such metrics file"):
        plot_curves({"demo": tmp_path / "absent.jsonl"}, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()
