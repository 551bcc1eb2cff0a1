"""A user's reward functions in a run: one that is right, ones that misbehave, and Python functions."""

import zlib

import pytest
import torch

from mssr.config import load_config
from mssr.errors import UserError
from mssr.rewards.grading import LOG
from mssr.rollout.base import Response, collect
from mssr.training.run import Run
from mssr.training.same_run import SameRun

OWN = """
from mssr.rewards.builtin.format import format
from mssr.rewards.builtin.math import math

def check(response, row):
    return {"accuracy": math(response, row), "format": format(response, row)}
"""

MISBEHAVING = """
import math, sys, time, zlib

def check(response, row):
    match zlib.crc32((row.problem + row.answer).encode()) % 8:
        case 0:
            time.sleep(60)
        case 1:
            raise ValueError("a bug")
        case 2:
            return math.nan
        case 3:
            return len(bytearray(1 << 33))
        case 4:
            sys.exit("bye")
        case 5:
            print("x" * (1 << 22))
    return 1.0
"""
SETTINGS = ["data.val=null", "reward.weights={}", "reward.timeout_s=1", "reward.memory_gib=0.5", "reward.workers=2"]


def what_happens(record):
    return zlib.crc32((record["problem"] + record["answer"]).encode()) % 8


def test_the_built_in_check_as_a_users_file_gives_the_same_run(mssr, warm, whole, run, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    mssr("train", warm, run.override, "train.steps=2", f"reward.function={tmp_path}/own.py:check").check()
    for step in range(3):
        mine, theirs = run.metrics[step], whole.metrics[step]
        assert {key: mine[key] for key in theirs} == theirs
    assert run.rollouts(2) == whole.rollouts(2)


def test_a_run_survives_what_its_reward_does(mssr, warm, run, tmp_path):
    (tmp_path / "bad.py").write_text(MISBEHAVING)
    settings = [*SETTINGS, f"reward.function={tmp_path}/bad.py:check", "train.steps=1"]
    settings += ["rollout.prompts_per_step=32", "log.rollouts_saved=32"]
    ended = mssr("train", warm, run.override, *settings).check()
    records, metrics = run.rollouts(1), run.metrics[1]
    happened = [what_happens(record) for record in records]
    assert [record["reward"] for record in records] == [float(each > 4) for each in happened]
    assert [record["parts"] for record in records] == [{"accuracy": 1.0} if each > 4 else {} for each in happened]
    assert metrics["reward/timeouts"] == happened.count(0)
    assert metrics["reward/errors"] == sum(0 < each < 5 for each in happened)
    assert metrics["train/correct"] == sum(each > 4 for each in happened) / 32 and metrics["train/grad_norm"] > 0
    said = [line.partition(": ")[2].partition(": ")[2] for line in ended.err.splitlines()]
    starts = {"took more than 1 s", "ValueError: a bug (", "returned nan", "MemoryError", "SystemExit: bye ("}
    assert len(said) == len(starts) and all(sum(line.startswith(start) for line in said) == 1 for start in starts), said
    log = (run.path / LOG).read_bytes()
    assert b"raise ValueError" in log and b"xxxx" in log and len(log) < (1 << 20) + 500


@pytest.mark.slow("10 s: two ranks that leave out what their rewards failed on, alike")
def test_ranks_leave_out_the_same_responses(mssr, warm, run, tmp_path):
    (tmp_path / "bad.py").write_text(MISBEHAVING)
    settings = [*SETTINGS, f"reward.function={tmp_path}/bad.py:check", "train.steps=1", "reward.on_error=skip"]
    first, second = mssr.ranks(2, "train", warm, run.override, *settings)
    assert len(first.check().err.splitlines()) == 5 and second.check().err == ""
    records, metrics = run.rollouts(1), run.metrics[1]
    assert metrics["train/correct"] == 1.0 and metrics["reward/accuracy"] == 1.0
    assert [record["graded"] for record in records] == [what_happens(record) > 4 for record in records]
    assert {record["advantage"] for record in records} == {0.0}  # those that are graded have equal rewards
    state = torch.load(run.path / "checkpoints" / "step_000001" / "state.pt", weights_only=True)
    assert len(state["tracker"]["keys"]) == 16 - metrics["reward/timeouts"] - metrics["reward/errors"]


def test_a_failure_ends_the_run_in_one_line(mssr, warm, run, tmp_path):
    (tmp_path / "bad.py").write_text("def check(response, row):\n    return row['level']\n")
    settings = [
        f"reward.function={tmp_path}/bad.py:check",
        "reward.on_error=fail",
        "data.val=null",
        "reward.weights={}",
    ]
    line = mssr("train", warm, run.override, *settings).line
    assert (
        line.startswith("reward function accuracy, row ") and f"KeyError: 'level' ({tmp_path}/bad.py, line 2)" in line
    )
    assert line.endswith(f"; fix it, or set reward.on_error=zero or skip; more in {run.path}/{LOG}")


def test_a_function_that_is_not_there_is_said_before_the_model_loads(mssr, warm, run, tmp_path):
    ended = mssr("train", warm, run.override, f"reward.function={tmp_path}/none.py:check", "reward.weights={}")
    assert ended.line == f"reward.function {tmp_path}/none.py:check: {tmp_path}/none.py: No such file or directory"
    assert "loading" not in ended.out and not run.path.exists()


@pytest.mark.parametrize(
    "settings, line",
    [
        (
            ["reward.weights={acuracy: 2}"],
            "reward.weights.acuracy: no reward function returns this part; they return accu",
        ),
        (
            ["reward.weights={}", "reward.success=quality"],
            "reward.success quality: no reward function returns this part",
        ),
    ],
)
def test_a_part_that_no_built_in_returns_is_refused_at_the_start(material, single_process, settings, line):
    with pytest.raises(UserError, match=f"^{line}"):
        Run(load_config(material / "config.yaml", ["reward.function=math", *settings]))


def test_a_python_function_is_the_reward(material, single_process, tmp_path):
    factor = 0.5
    settings = ["reward.function=math", "reward.weights={bonus: 0.5}", f"run_dir={tmp_path}"]
    config = load_config(material / "config.yaml", settings)
    with Run(config, reward=lambda response, row: {"accuracy": 0, "bonus": 2 * factor * len(row.answer)}) as run:
        prompts = run.problems.load(range(2))
        responses = [Response(torch.tensor([5]), torch.zeros(1), False, 0) for _ in prompts]
        graded = run.grader.begin(prompts).finish(collect(prompts, responses, pad=0))
        assert graded.reward.tolist() == [0.5 * len(prompt.answer) for prompt in prompts]
        assert run.config.reward.function.endswith("test_a_python_function_is_the_reward.<locals>.<lambda>")
        assert not run.config.reward.needs_answer and config.reward.function == "math"


def test_a_python_function_and_another_one_are_refused(material, single_process):
    with pytest.raises(
        UserError, match=r"^reward\.function is \{'accuracy': 'math', .*, and a Python function <lambda> is"
    ):
        Run(load_config(material / "config.yaml"), reward=lambda response, row: 1.0)


def test_files_with_weights_may_move(material):
    def same_run(folder):
        return SameRun("train", load_config(material / "config.yaml", [f"data.train={{{folder}/a.jsonl: 2}}"]))

    assert same_run("there").changes(same_run("here").state_dict("data")) == []


def test_another_reward_on_resume_is_a_change(material):
    config = material / "config.yaml"
    before = SameRun("train", load_config(config)).state_dict("data")
    now = SameRun("train", load_config(config, ["reward.function.accuracy=exact", "reward.weights.format=0.25"]))
    now.refuse_other_settings(before)
    assert now.changes(before) == [
        "reward.function.accuracy 'exact' (was 'math')",
        "reward.weights.format 0.25 (was 0.5)",
    ]
