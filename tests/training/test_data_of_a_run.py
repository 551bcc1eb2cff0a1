"""Weighted files and solved prompts in a run: what is drawn, reported, and resumed."""

import json
import shutil

import pyarrow.parquet
import pytest
from mssr_process import Moment
from run_folder import RunFolder

STEPS = 14


@pytest.fixture(scope="module")
def settings(warm, tmp_path_factory):
    """Return overrides: 8 rows, and 8 that are drawn twice; an epoch is 3 steps. A value of 0.5 is enough."""
    folder = tmp_path_factory.mktemp("rows")
    table = pyarrow.parquet.read_table(warm.parent / "data" / "train.parquet")
    for name, start in (("once", 0), ("twice", 8)):
        pyarrow.parquet.write_table(table.slice(start, 8), folder / f"{name}.parquet")
    return [
        f"data.train={{{folder}/once.parquet: 1, {folder}/twice.parquet: 2}}",
        "data.val=null",
        "data.drop_solved=0.5",
        "rollout.prompts_per_step=8",
        "train.responses_per_update=8",
        f"train.steps={STEPS}",
    ]


@pytest.fixture(scope="module")
def whole(mssr, warm, settings, tmp_path_factory):
    folder = RunFolder(tmp_path_factory.mktemp("whole_solved") / "run")
    mssr("train", warm, folder.override, *settings).check()
    return folder


def drawn(run: RunFolder) -> list[list[tuple[str, int]]]:
    return [
        [(line["source"].split("/")[-1], line["row"]) for line in run.rollouts(step)] for step in range(1, STEPS + 1)
    ]


def test_what_is_solved_is_reported_and_not_drawn_again(whole):
    rows = drawn(whole)
    epoch = sum(rows[:3], [])
    assert {place: epoch.count(place) for place in epoch} == {
        (f"{name}.parquet", row): count for name, count in (("once", 1), ("twice", 2)) for row in range(8)
    }
    report = json.loads((whole.path / "data_report.json").read_text())["train"]
    solved = {(entry["source"].split("/")[-1], one["row"]): one for entry in report for one in entry["solved"]}
    assert 0 < len(solved) <= 8
    assert whole.metrics[-1]["data/solved"] == len(solved) and whole.metrics[1]["data/solved"] == 0
    assert all(one["value"] >= 0.5 for one in solved.values())
    last = set(sum(rows[-1:], []))
    early = {place for place, one in solved.items() if one["not_from_epoch"] <= 4}
    assert early and last.isdisjoint(early)


def test_a_killed_run_goes_on_with_the_same_rows(mssr, warm, run, settings, whole):
    killed = mssr("train", warm, run.override, *settings, at=Moment("os.mkdir", "rollouts/.partial_step_000011"))
    assert killed.code == -9
    mssr("train", warm, run.override, *settings, "--resume").check()
    run.assert_same_as(whole)
    assert drawn(run) == drawn(whole)
    reports = [(each.path / "data_report.json").read_text() for each in (run, whole)]
    assert reports[0] == reports[1]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.drop_solved=0.6", ["data.drop_solved is 0.6", "had 0.5"]),
        ("data.system_prompt=Hi", ["data.system_prompt is 'Hi'", "had None"]),
        ("data.template={template}", ["data.template is '{{ problem }}", "had None"]),
        ("data.train={once}", ["data.train", "is not what the checkpoint was trained on"]),
    ],
)
def test_what_would_be_another_run_is_refused(mssr, warm, settings, whole, tmp_path, override, words):
    (tmp_path / "t.jinja").write_text("{{ problem }}!")
    once = settings[0].partition("{")[2].partition(":")[0]
    override = override.format(template=tmp_path / "t.jinja", once=once)
    line = mssr("train", warm, whole.override, *settings, override, "--resume").line
    assert all(word in line for word in words), line


def test_another_report_is_kept(mssr, warm, settings, run):
    run.path.mkdir()
    (run.path / "data_report.json").write_text("mine")
    line = mssr("train", warm, run.override, *settings).line
    assert line.startswith(f"{run.path}/data_report.json: not written by this run")
    assert (run.path / "data_report.json").read_text() == "mine"
    shutil.rmtree(run.path)
