"""A study's file and its arms are validated before anything runs."""

from pathlib import Path

import pytest
import yaml

from bench.study.grid import expand
from bench.study.spec import load_study
from mssr.config import load_config
from mssr.errors import UserError

ROOT = Path(__file__).parents[2]
RUN = {
    "run_dir": "runs/x",
    "model": {"path": "somewhere"},
    "data": {"train": "train.parquet", "val": "val.parquet"},
    "rollout": {"prompts_per_step": 16},
    "train": {"responses_per_update": 8},
}
STUDY = {
    "out": "runs/toy",
    "question": "Which?",
    "match": "updates",
    "budget": 16,
    "seeds": [3, 4],
    "arms": {"mssr": None, "grpo": {"algorithm.name": "grpo", "rollout.responses_per_prompt": 4}},
}


@pytest.fixture
def write(tmp_path):
    def write(run=RUN, **keys) -> Path:
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
        study = STUDY | {"config": str(tmp_path / "run.yaml")} | keys
        path = tmp_path / "study.yaml"
        path.write_text(
            yaml.safe_dump({key: value for key, value in study.items() if value != "absent"}, sort_keys=False)
        )
        return path

    return write


def planned(path, starts=None):
    return expand(load_study(path), path, starts)


def refused(path):
    with pytest.raises(UserError) as caught:
        planned(path)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{path}: ")
    return line


def test_arms_times_seeds_seed_by_seed(write):
    runs = planned(write(set={"train.optimizer.lr": "1e-5", "train.optimizer.betas": [0.9, 1e-4]}))
    assert [run.name for run in runs] == ["mssr seed 3", "grpo seed 3", "mssr seed 4", "grpo seed 4"]
    assert len({run.folder for run in runs}) == 4
    for run in runs:
        assert run.config.seed == run.seed
        assert run.config.train.optimizer.lr == 1e-5 and run.config.train.optimizer.betas == (0.9, 1e-4)
        assert run.config.run_dir == run.folder and run.config.train.budget.updates == 16
    assert (runs[0].config.train.steps, runs[1].config.train.steps) == (8, 2)  # 2 and 8 updates per step


def test_what_an_arm_sets_stands_above_what_all_set(write):
    arms = {"mssr": {"train.optimizer.lr": 2e-5}, "grpo": {"algorithm.name": "grpo", "rollout.responses_per_prompt": 4}}
    first, second, *_ = planned(write(arms=arms, set={"train.optimizer.lr": 1e-5}))
    assert (first.config.train.optimizer.lr, second.config.train.optimizer.lr) == (2e-5, 1e-5)


def test_the_command_line_makes_the_configuration_that_was_checked(write, tmp_path):
    path = write(set={"train.optimizer.betas": [0.9, 1e-4], "data.instruction": "Box it: 'yes', \\boxed{x} # or no"})
    for run in planned(path):
        assert load_config(tmp_path / "run.yaml", run.overrides) == run.config


@pytest.mark.parametrize(
    "match, budget, steps",
    [("rollouts", 100, [7, 2]), ("tokens", 1000, [63, 16]), ("seconds", 1.5, [1_000_000, 1_000_000])],
)
def test_steps_are_more_than_a_budget_pays_for(write, match, budget, steps):
    runs = planned(write(match=match, budget=budget))
    assert [run.config.train.steps for run in runs[:2]] == steps
    assert all(getattr(run.config.train.budget, match) == budget for run in runs)
    assert all(run.config.train.budget.updates is None for run in runs)


def test_a_start_gives_paths_to_every_arm_of_its_seed(write):
    path = write(start="digits", digits={"train": 64})
    planned(path)  # checked before the start exists
    starts = {seed: [f"model.path=m{seed}", f"data.train=t{seed}", f"data.val=v{seed}"] for seed in (3, 4)}
    for run in planned(path, starts):
        assert (run.config.model.path, run.config.data.val) == (f"m{run.seed}", f"v{run.seed}")


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"armz": {}}, ["unknown key armz", "did you mean arms?"]),
        ({"claims": [{"text": "x", "highr": "mssr", "lower": "grpo"}]}, ["claims.0.highr", "did you mean higher?"]),
        ({"digits": {"hiden": 64}, "start": "digits"}, ["digits.hiden", "did you mean hidden?"]),
        ({"question": "absent"}, ["question", "required"]),
        ({"match": "steps"}, ["match", "'updates'", "got 'steps'"]),
        ({"seeds": [1, 1]}, ["seeds", "twice"]),
        ({"budget": 12.5}, ["budget 12.5 updates", "whole"]),
        ({"arms": {}}, ["arms"]),
        ({"arms": {"a/b": {}}}, ["arm 'a/b'", "folder"]),
        ({"match": "seconds", "jobs": 2}, ["match seconds", "slow each other down", "jobs to 1"]),
        ({"digits": {"train": 64}}, ["set start: digits"]),
        ({"claims": [{"text": "x", "higher": "mssr", "lower": "grp"}]}, ["no arm grp", "did you mean grpo?"]),
        (
            {"claims": [{"text": "x", "higher": "mssr", "lower": "grpo", "at": "updates_to", "threshold": 0.5}]},
            ["add 0.5 to thresholds"],
        ),
        # Of the arms:
        (
            {"arms": {"ok": None, "bad": {"algorithm.nme": "x"}}},
            ["arm bad", "unknown key algorithm.nme", "algorithm.name"],
        ),
        ({"arms": {"bad": {"train.optimizer.lr": -1}}}, ["arm bad", "train.optimizer.lr", "greater than 0", "got -1"]),
        ({"arms": {"bad": {"train.steps": 5}}}, ["arm bad", "train.steps is set by the study"]),
        ({"arms": {"bad": {"train": {"steps": 5}}}}, ["arm bad", "train is a whole section"]),
        ({"set": {"seed": 5}}, ["set: seed is set by the study"]),
        ({"set": {"train.budget.tokens": 5}}, ["train.budget.tokens is set by the study"]),
        ({"start": "digits", "set": {"data.val": "x"}}, ["data.val comes from start: digits"]),
        ({"budget": 14}, ["arm grpo", "14 updates", "a step has 8", "multiple"]),
        (
            {"match": "rollouts", "set": {"train.optimizer.schedule": "cosine"}},
            ["arm mssr", "schedule cosine", "constant"],
        ),
        ({"set": {"data.val": None}}, ["arm mssr", "set data.val"]),
        ({"config": "nowhere.yaml"}, ["nowhere.yaml: no such config file"]),
    ],
)
def test_mistakes_are_reported_in_one_line(write, keys, words):
    line = refused(write(**keys))
    assert all(word in line for word in words), line


def test_two_arms_with_one_name_are_refused(write):
    path = write()
    path.write_text(path.read_text().replace("arms:\n", "arms:\n  grpo:\n    algorithm.name: rloo\n"))
    assert "grpo is there twice" in refused(path)


@pytest.mark.parametrize(
    "text, words", [("- a\n", "found list"), ("a: [", "not valid YAML"), (None, "no such study file")]
)
def test_a_file_that_is_no_study(tmp_path, text, words):
    path = tmp_path / "study.yaml"
    if text is not None:
        path.write_text(text)
    assert words in refused(path)


def test_more_jobs_on_the_command_line_are_checked_too(write):
    spec = load_study(write(match="seconds"))
    assert load_study(write()).with_jobs(2).jobs == 2
    with pytest.raises(UserError, match="slow each other"):
        spec.with_jobs(2)


STUDIES = [path for path in (ROOT / "bench/study/configs").glob("*.yaml") if "arms" in yaml.safe_load(path.read_text())]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_studies_that_are_shipped_can_start(path, monkeypatch):
    monkeypatch.chdir(ROOT)  # the paths in the files are relative to it
    spec = load_study(path)
    assert len(planned(path)) == len(spec.arms) * len(spec.seeds)


def test_the_quick_study_is_shipped():
    assert "digits_quick" in {path.stem for path in STUDIES}
