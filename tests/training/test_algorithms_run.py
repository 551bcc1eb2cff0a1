"""Runs of the algorithms that MSSR is compared with: groups, dynamic sampling, prioritised prompts, text-only KL."""

import re
import statistics

import pytest
from run_folder import RunFolder

from mssr.observe.metrics import read_metrics

GROUPS = ("rollout.prompts_per_step=4", "rollout.responses_per_prompt=4")  # 16 responses per step, as without groups
STEPS = "train.steps=3"


@pytest.fixture(scope="module")
def train(mssr, warm, tmp_path_factory):
    def train(*overrides, ranks=1):
        folder = RunFolder(tmp_path_factory.mktemp("algorithm") / "run")
        command = ("train", warm, folder.override, *overrides)
        for ended in mssr.ranks(ranks, *command) if ranks > 1 else [mssr(*command)]:
            ended.check()
        return folder

    return train


@pytest.fixture(scope="module")
def grpo(train):
    return train("algorithm.name=grpo", *GROUPS, STEPS)


@pytest.fixture(scope="module")
def dapo(train):
    return train("algorithm.name=grpo", "algorithm.dynamic_sampling=20", "eval.every=1", *GROUPS, STEPS)


@pytest.fixture(scope="module")
def spo(train):
    return train("algorithm.name=spo", "eval.every=1", STEPS)


def groups_of(rollouts):
    return [rollouts[start : start + 4] for start in range(0, 16, 4)]


def test_a_group_answers_one_prompt(grpo):
    for step in (1, 2, 3):
        groups = groups_of(grpo.rollouts(step))
        assert [len({rollout["row"] for rollout in group}) for group in groups] == [1] * 4
        assert len({group[0]["row"] for group in groups}) == 4
    responses = [rollout["response"] for rollout in grpo.rollouts(1)]
    assert len(set(responses)) > 8  # each has its own noise


def test_grpo_compares_within_groups(grpo):
    for group in groups_of(grpo.rollouts(1)):
        rewards = [rollout["reward"] for rollout in group]
        mean, std = statistics.fmean(rewards), statistics.stdev(rewards)
        expected = [(reward - mean) / (std + 1e-6) for reward in rewards]
        assert [rollout["advantage"] for rollout in group] == pytest.approx(expected, abs=1e-4)


def test_rloo_compares_with_the_others(train):
    for group in groups_of(train("algorithm.name=rloo", *GROUPS, "train.steps=1").rollouts(1)):
        rewards = [rollout["reward"] for rollout in group]
        expected = [reward - (sum(rewards) - reward) / 3 for reward in rewards]
        assert [rollout["advantage"] for rollout in group] == pytest.approx(expected, abs=1e-5)


def test_reinforce_pp_whitens_over_tokens(train):
    rollouts = train("algorithm.name=reinforce_pp", "train.steps=1").rollouts(1)
    tokens = [rollout["reward"] for rollout in rollouts for _ in range(rollout["tokens"])]
    mean, std = statistics.fmean(tokens), statistics.stdev(tokens)
    expected = [(rollout["reward"] - mean) / std for rollout in rollouts]
    assert [rollout["advantage"] for rollout in rollouts] == pytest.approx(expected, abs=1e-4)


def test_what_has_no_tracker_reports_none(grpo):
    assert not [key for line in grpo.metrics for key in line if key.startswith("tracker/")]
    assert {rollout["baseline"] for rollout in grpo.rollouts(1)} == {None}


def test_only_mssr_shapes(grpo, spo):
    assert {line["policy/shaping"] for run in (grpo, spo) for line in run.metrics[1:]} == {0}


def test_dynamic_sampling_leaves_no_group_that_says_nothing(grpo, dapo):
    assert max(line["rollout/zero_variance"] for line in grpo.metrics[1:]) > 0
    assert [line["rollout/zero_variance"] for line in dapo.metrics[1:]] == [0] * 3
    for step in (1, 2, 3):
        for group in groups_of(dapo.rollouts(step)):
            assert len({rollout["row"] for rollout in group}) == 1
            assert len({rollout["reward"] for rollout in group}) > 1


def test_dynamic_sampling_keeps_the_groups_that_said_something(grpo, dapo):
    """Before the refill, the first step's rollouts are the same in both runs."""
    kept = 0
    for before, after in zip(groups_of(grpo.rollouts(1)), groups_of(dapo.rollouts(1)), strict=True):
        if len({rollout["reward"] for rollout in before}) > 1:
            assert [rollout["response"] for rollout in after] == [rollout["response"] for rollout in before]
            kept += 1
        else:
            assert after[0]["row"] != before[0]["row"]
    assert kept > 0


def test_dropped_groups_cost_too(grpo, dapo):
    assert [line["cost/rollouts"] for line in grpo.metrics] == [0, 16, 32, 48]
    spent = [line["cost/rollouts"] for line in dapo.metrics]
    assert spent[-1] > 48 and all(rollouts % 4 == 0 for rollouts in spent)
    assert dapo.metrics[-1]["cost/updates"] == grpo.metrics[-1]["cost/updates"] == 6
    tokens = sum(rollout["tokens"] for step in (1, 2, 3) for rollout in grpo.rollouts(step))
    assert grpo.metrics[-1]["cost/response_tokens"] == tokens


def test_groups_on_two_ranks(train, dapo):
    """Updates of 8 responses: each group of 4 is on one rank."""
    two = train("algorithm.name=grpo", "algorithm.dynamic_sampling=20", *GROUPS, STEPS, ranks=2)
    assert_equal_runs(two, dapo)


def test_groups_cut_across_ranks(train, grpo):
    """Groups of 8 in updates of 8: half of each group is on each rank."""
    halves = ("rollout.prompts_per_step=2", "rollout.responses_per_prompt=8", "algorithm.dynamic_sampling=20")
    one = train("algorithm.name=rloo", *halves, "train.steps=2")
    assert_equal_runs(train("algorithm.name=rloo", *halves, "train.steps=2", ranks=2), one)


def test_groups_on_two_ranks_under_zero3(train, grpo):
    assert_equal_runs(train("algorithm.name=grpo", "train.zero_stage=3", *GROUPS, STEPS, ranks=2), grpo)


def test_first_rollouts_where_a_step_has_fewer_prompts_than_ranks(train):
    one_prompt = ("rollout.prompts_per_step=1", "rollout.responses_per_prompt=16", "algorithm.tracker.n_init=1")
    run = train("algorithm.name=mssr", *one_prompt, "train.steps=1", ranks=2)
    assert [line["cost/rollouts"] for line in run.metrics] == [64, 80]


def assert_equal_runs(run, other):
    for mine, theirs in zip(run.metrics, other.metrics, strict=True):
        for key in ("train/reward", "train/grad_norm", "policy/entropy", "cost/rollouts", "cost/response_tokens"):
            assert mine.get(key, 0) == pytest.approx(theirs.get(key, 0), rel=2e-3, abs=1e-5), (mine["step"], key)


@pytest.mark.parametrize("name", ["spo", "dapo"])
def test_a_resumed_run_chooses_the_same_prompts(mssr, warm, run, request, name):
    whole = request.getfixturevalue(name)
    algorithm = ["algorithm.name=spo"] if name == "spo" else ["algorithm.name=grpo", "algorithm.dynamic_sampling=20"]
    common = ["train", warm, run.override, "eval.every=1", *algorithm, *(GROUPS if name == "dapo" else [])]
    mssr(*common, "train.steps=2").check()
    mssr(*common, STEPS, "--resume").check()
    run.assert_same_as(whole)
    seconds = [line["cost/seconds"] for line in read_metrics(run.path / "metrics.jsonl")]
    assert seconds == sorted(seconds)  # the time before the resume counts


def test_prioritised_prompts_are_the_uncertain_ones(train, tmp_path):
    """A success of 1 or 1/2, by the prompt, in eight first rollouts: values 0.94 and 0.5, weights sqrt(v (1 - v)) + 0.05."""
    (tmp_path / "halves.py").write_text("def halves(response, row):\n    return 1 - int(row.answer) % 2 / 2\n")
    reward = (f"reward.function={tmp_path}/halves.py:halves", "reward.weights={}")
    sharp = (*reward, "algorithm.tracker.n_init=8", "algorithm.tracker.rho_min=0.95", "algorithm.tracker.rho_max=0.96")
    drawn = train("algorithm.name=spo", *sharp, "rollout.prompts_per_step=16", "train.steps=1").rollouts(1)
    assert len({rollout["row"] for rollout in drawn}) == 16
    uniform = train("algorithm.name=mvsr", *sharp, "rollout.prompts_per_step=64", "train.steps=1").rollouts(1)
    spread = statistics.fmean(abs(rollout["baseline"] - 0.5) for rollout in uniform)
    assert statistics.fmean(abs(rollout["baseline"] - 0.5) for rollout in drawn) < spread


def test_the_text_only_kl_reaches_the_loss(train):
    """Without images the warm policy differs, so that the KL term is positive at once and changes the gradient."""
    without = train("algorithm.name=mvsr", "train.steps=1").metrics[1]
    pulled = train(
        "algorithm.name=mvsr", "algorithm.kl_coef=0.2", "algorithm.kl_to=text_only", "train.steps=1"
    ).metrics[1]
    frozen = train("algorithm.name=mvsr", "algorithm.kl_coef=0.2", "train.steps=1", "train.responses_per_update=16")
    assert pulled["policy/kl"] > 1e-3 and frozen.metrics[1]["policy/kl"] == pytest.approx(0, abs=1e-6)
    assert pulled["train/reward"] == without["train/reward"]
    assert pulled["train/grad_norm"] != pytest.approx(without["train/grad_norm"], rel=1e-3)


@pytest.mark.parametrize(
    ("budget", "steps"),
    [("updates=3", 2), ("rollouts=32", 2), ("rollouts=33", 3), ("tokens=1", 1), ("seconds=0.05", 1)],
)
def test_a_budget_ends_the_run_with_the_step_that_reaches_it(train, budget, steps):
    metrics = train(f"train.budget.{budget}").metrics
    assert [line["step"] for line in metrics] == list(range(steps + 1))
    assert "val/accuracy" in metrics[-1]


def test_first_rollouts_are_part_of_the_budget(train):
    """64 problems once, then 16 per step."""
    spent = [line["cost/rollouts"] for line in train("algorithm.tracker.n_init=1", "train.budget.rollouts=90").metrics]
    assert spent == [64, 80, 96]


@pytest.mark.parametrize(("budget", "spent"), [("rollouts=64", "rollouts 64.*spent 64"), ("tokens=1", "tokens 1:")])
def test_first_rollouts_that_spend_the_whole_budget_are_a_mistake(mssr, warm, run, budget, spent):
    line = mssr("train", warm, run.override, "algorithm.tracker.n_init=1", f"train.budget.{budget}").line
    assert re.search(rf"train\.budget\.{spent}.*set algorithm\.tracker\.n_init=0", line)


def test_a_tracker_cannot_start_in_the_middle_of_a_run(mssr, warm, run):
    mssr("train", warm, run.override, "algorithm.name=reinforce_pp", "train.steps=1").check()
    command = ("train", warm, run.override, "algorithm.name=mssr", "train.steps=2", "--resume")
    line = mssr(*command, "algorithm.tracker.n_init=1").line
    assert "algorithm.name mssr: the checkpoint's run had no value tracker" in line
    mssr(*command, "algorithm.tracker.n_init=0").check()


def test_a_run_that_spent_its_budget_is_finished(mssr, warm, run):
    command = ("train", warm, run.override, "train.budget.updates=2")
    mssr(*command).check()
    before = run.metrics
    mssr(*command, "--resume").check()
    assert run.metrics == before and run.checkpoints == ["step_000001"]


def test_a_loss_over_part_of_the_vocabulary_is_nearly_the_exact_one(train):
    exact = train("train.steps=1").metrics[1]
    close, far = (train(f"train.vocab_drop_tol={tol}", "train.steps=1").metrics[1] for tol in (1e-3, 0.5))
    assert close["train/grad_norm"] == pytest.approx(exact["train/grad_norm"], rel=1e-4)
    assert far["train/grad_norm"] != pytest.approx(exact["train/grad_norm"], rel=1e-4)
    assert far["policy/entropy"] == pytest.approx(exact["policy/entropy"], rel=1e-2)  # values are exact
