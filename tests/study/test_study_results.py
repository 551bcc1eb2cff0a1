"""Values read from runs, against numbers worked out by hand."""

import pytest
from study_runs import study_results, write_run

from bench.study.curves import band
from bench.study.results import load_results, mean_over, read_run, write_results
from bench.study.summary import summarise
from bench.study.table import results_table
from mssr.errors import UserError


def read(folder, accuracies, *, match="updates", budget=16.0, thresholds=(), **more):
    return read_run(write_run(folder / "run", accuracies, **more), "arm", 0, match, budget, list(thresholds))


def test_accuracies_and_costs_of_a_run(tmp_path):
    """Validations at 0, 8 and 16 updates. Trapezoids: (.2 + .6) / 2 * 8 + (.6 + .5) / 2 * 8 = 7.6; by 16: 0.475."""
    run = read(tmp_path, [0.2, 0.6, 0.5], thresholds=[0.2, 0.55, 0.7], rollouts_at_start=64)
    assert (run.start, run.final, run.best) == (0.2, 0.5, 0.6)
    assert run.auc == pytest.approx(0.475)
    assert not run.collapsed and run.end == "budget"
    assert run.spent == {"updates": 16, "rollouts": 16 * 4 + 64, "tokens": 400, "seconds": 2.0}
    assert (run.steps, run.wall_seconds, run.cpu_seconds) == (4, 20.0, 18.0)
    assert [(found.threshold, found.spent["updates"], found.spent["rollouts"]) for found in run.reached] == [
        (0.2, 0, 64),
        (0.55, 8, 96),
    ]


def test_the_mean_over_rollouts_includes_the_trackers_initialisation(tmp_path):
    """0.2 over the 64 rollouts of the initialisation, then 0.2 to 0.6 over 32: (64 * .2 + 32 * .4) / 96."""
    run = read(tmp_path, [0.2, 0.6], match="rollouts", budget=96, rollouts_at_start=64)
    assert run.auc == pytest.approx((64 * 0.2 + 32 * 0.4) / 96)


def test_mean_over_a_curve():
    assert mean_over([(0.0, 0.3)]) == 0.3
    assert mean_over([(0.0, 0.0), (1.0, 1.0), (4.0, 1.0)]) == pytest.approx((0.5 + 3) / 4)


@pytest.mark.parametrize(
    "accuracies, collapsed",
    [
        ([0.3, 0.5, 0.5], False),
        ([0.3, 0.5, 0.41], False),  # 82 % of the best
        ([0.3, 0.5, 0.39], True),  # 78 %
        ([0.3, 0.32, 0.29], False),  # below its start, but 91 % of its best: no progress, but no collapse
        ([0.5, 0.3, 0.39], True),  # the best is the start
        ([0.0, 0.0, 0.0], False),
    ],
)
def test_collapse_is_a_fall_far_below_the_best(tmp_path, accuracies, collapsed):
    assert read(tmp_path, accuracies).collapsed is collapsed


def test_a_diverged_run_counts_nothing_from_there_on(tmp_path):
    """0.4 to 0.8 over 8 updates, 0 from there to 32: 0.6 * 8 / 32."""
    run = read(tmp_path, [0.4, 0.8], budget=32, end="diverged")
    assert (run.final, run.best, run.collapsed) == (0.0, 0.8, True)
    assert run.auc == pytest.approx(0.15)
    results = study_results(tmp_path / "s", {"a": [[0.4, 0.8]]}, budget=32, ends={("a", 0): "diverged"})
    assert results.accuracy_curve(results.runs[0], "updates") == ([0, 8, 8, 32], [0.4, 0.8, 0.0, 0.0])
    assert results.accuracy_curve(results.runs[0], "rollouts") == ([0, 32, 32, 128], [0.4, 0.8, 0.0, 0.0])


def test_series_at_the_end_over_the_run_and_thinned(tmp_path):
    values = [float(step) for step in range(1, 401)]
    values[3] = None  # how a NaN is recorded
    run = read(tmp_path, [0.1, 0.2, 0.3], every=200, budget=1600, policy__entropy=values)
    assert run.ends["policy/entropy"] == pytest.approx(sum(range(361, 401)) / 40)  # a tenth of the 399 finite ones
    assert run.means["policy/entropy"] == pytest.approx((400 * 401 / 2 - 4) / 399)
    updates, entropy = run.curves.points("policy/entropy", "updates")
    assert 90 < len(entropy) < 130 and updates[-1] == 1600
    assert entropy[0] == pytest.approx((1 + 2 + 3) / 3)  # blocks of 4 steps; without the NaN
    assert entropy[1] == pytest.approx((5 + 6 + 7 + 8) / 4)
    assert run.curves.points("val/accuracy", "updates") == ([0, 800, 1600], [0.1, 0.2, 0.3])
    assert run.curves.points("train/reward", "updates") == ([], [])


def test_calibration_bins_add_up(tmp_path):
    table = [[2.0, 0.1 * n, 1.0] for n in range(10)]
    run = read(tmp_path, [0.1, 0.2, 0.3], bins=table)
    assert [pytest.approx(row) for row in run.bins] == [[8.0, 0.4 * n, 4.0] for n in range(10)]
    assert read(tmp_path / "without", [0.1, 0.2]).bins is None


def test_a_band_over_seeds_of_different_steps():
    seeds = band([([0, 2, 4], [0.0, 2.0, 4.0]), ([0, 1, 4, 6], [2.0, 2.0, 5.0, 9.0])], [False, False])
    assert seeds.x.tolist() == [0, 1, 2, 4]
    assert seeds.mean.tolist() == [1.0, 1.5, 2.5, 4.5]
    assert seeds.low.tolist() == [0.0, 1.0, 2.0, 4.0] and seeds.high.tolist() == [2.0, 2.0, 3.0, 5.0]


def test_a_diverged_seed_does_not_shorten_the_band():
    seeds = band([([0, 1, 2], [0.0, 1.0, 2.0]), ([0, 1], [2.0, 3.0])], [False, True])
    assert seeds.x.tolist() == [0, 1, 2] and seeds.mean.tolist() == [1.0, 2.0, 2.0]
    assert band([([0, 1], [0.0, 1.0])], [True]).x.tolist() == [0, 1]
    assert band([([], [])], [False]) is None


def test_results_are_the_same_when_read_back(tmp_path):
    results = study_results(tmp_path, {"a": [[0.1, 0.2], [0.2, 0.3]], "b": [[0.1, 0.1], [0.2, 0.1]]}, thresholds=[0.2])
    write_results(results, tmp_path / "results.json")
    assert load_results(tmp_path) == load_results(tmp_path / "results.json") == results


def test_files_that_are_not_results_are_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match="not found; run the study first"):
        load_results(tmp_path)
    (tmp_path / "results.json").write_text('{"name": "x"}')
    with pytest.raises(UserError, match=r"results\.json: not a study's results: question: Field required"):
        load_results(tmp_path)
    (write_run(tmp_path / "run", [0.1, 0.2]) / "metrics.jsonl").write_text('{"step": 0, "val/accuracy": 0.5}\n')
    with pytest.raises(UserError, match="no cost/updates"):
        read_run(tmp_path / "run", "arm", 0, "updates", 8, [])


@pytest.mark.parametrize("kept", [0, 1, 20, -2])
def test_a_cut_file_is_named(tmp_path, kept):
    file = write_run(tmp_path / "run", [0.1, 0.2]) / "finished.json"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError, match=f"^{file}: damaged; remove the file, and run the study again"):
        read_run(tmp_path / "run", "arm", 0, "updates", 8, [])
    results = study_results(tmp_path, {"a": [[0.1, 0.2]]})
    write_results(results, tmp_path / "results.json")
    (tmp_path / "results.json").write_bytes((tmp_path / "results.json").read_bytes()[:kept])
    with pytest.raises(UserError, match=r"^.*results\.json: not a study's results: .*$"):
        load_results(tmp_path)


def test_a_row_of_the_table_by_hand(tmp_path):
    """Finals .40, .50 and .50, .58: differences 10 and 8 points, mean 9, s = sqrt(2), t(0.975; 1) = 12.7062."""
    arms = {"base": [[0.3, 0.3, 0.4], [0.3, 0.4, 0.5]], "new": [[0.3, 0.4, 0.5], [0.3, 0.75, 0.58]]}
    results = study_results(tmp_path, arms, thresholds=[0.45])
    base, new = summarise(results)
    assert (base.runs, base.difference, new.difference.mean) == (2, None, pytest.approx(0.09))
    assert new.difference.high - new.difference.mean == pytest.approx(0.127062, abs=1e-6)
    assert (base.collapsed, new.collapsed, new.diverged) == (0, 1, 0)
    assert new.reached[0].count == 2 and new.reached[0].spent["updates"] == 12  # at 16 and at 8
    lines = results_table(results).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:4]]
    assert len({len(row) for row in cells}) == 1
    row = dict(zip(cells[0], cells[3]))
    assert row["arm"] == "new" and row["final accuracy, %"] == "54.0 ± 50.8" and row["collapsed"] == "1/2"
    assert row["final − base, points"] == "+9.0 [-3.7, +21.7]"
    assert row["updates / rollouts to 45%"] == "12 / 48 (2/2)" and row["seconds (CPU)"] == "2 (18)"
    legend = "\n".join(lines[5:])
    assert "Budget: 16 optimiser updates per run." in legend and "below 80% of its best" in legend
    assert "the highest of 3 validations" in legend and "2 runs at a time shared the machine" in legend
    assert "value tracker" not in legend


def test_the_cost_of_trackers_before_the_first_update_is_reported(tmp_path):
    results = study_results(tmp_path, {"a": [[0.3, 0.4]], "b": [[0.3, 0.5]]}, budget=8, rollouts_at_start=64)
    assert "initialisation of the value tracker before the first update: 64 rollouts per run (a, b)." in results_table(
        results
    )


def test_one_seed_has_no_interval(tmp_path):
    table = results_table(study_results(tmp_path, {"a": [[0.3, 0.4]], "b": [[0.3, 0.5]]}, budget=8))
    assert "One seed, so there is no interval." in table and "±" not in table
    assert "| +10.0 |" in table


def test_missing_arms_and_seeds_are_listed(tmp_path):
    results = study_results(tmp_path, {"a": [[0.3, 0.4], [0.3, 0.4]], "b": [[0.3, 0.5]]}, budget=8)
    results = results.model_copy(update={"missing": ["b seed 1", "c seed 0"], "arms": {**results.arms, "c": {}}})
    assert [summary.arm for summary in summarise(results)] == ["a", "b"]
    assert summarise(results)[1].difference.n == 1
    assert "Not finished and not in this table: b seed 1, c seed 0." in results_table(results)
