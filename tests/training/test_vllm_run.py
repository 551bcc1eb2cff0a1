"""`mssr train` with vLLM in the same process: uninterrupted, and resumed."""

import pytest
from mssr_process import Moment
from run_folder import RunFolder

KILLED = -9


@pytest.fixture(scope="session")
def settings():
    """Overrides: vLLM, with every feature of the loop that concerns it."""
    return [
        "rollout.engine=vllm",
        "rollout.offload_optimizer=true",
        "rollout.truncated=masked",
        "rollout.max_response_tokens=8",  # truncates some responses
        "rollout.max_gap=1e-3",
        "train.zero_stage=2",
        "algorithm.tracker.n_init=1",
        "algorithm.tracker.drift=prompt",
    ]


@pytest.fixture(scope="session")
def whole_with_vllm(mssr, warm, settings, tmp_path_factory):
    folder = RunFolder(tmp_path_factory.mktemp("whole_with_vllm") / "run")
    folder.ended = mssr("train", warm, folder.override, *settings).check()
    return folder


def test_the_sampler_has_the_trainers_weights_at_every_step(whole_with_vllm):
    lines = whole_with_vllm.metrics[1:]
    assert len(lines) == 6
    for line in lines:
        assert line["rollout/logp_gap_max"] < 1e-4 and line["rollout/staleness"] == 0
    assert any(line["rollout/truncated"] > 0 for line in lines)


def test_nothing_but_the_progress_is_printed(whole_with_vllm):
    assert whole_with_vllm.ended.err == ""
    lines = whole_with_vllm.ended.out.splitlines()
    shown = ("step ", "mssr: ", "validation accuracy ", "cost ", "curves ", "rollouts ", "model ", "card ", "summary ")
    assert all(line.startswith(shown) for line in lines)
    assert {"mssr: starting vLLM", "mssr: first rollouts of the value tracker"} <= set(lines)


@pytest.mark.slow("9 s: a command that starts vLLM for one step")
def test_the_responses_of_a_group_are_drawn_apart(mssr, warm, run):
    """vLLM gets the same prompt four times in one call, with one seed for the call."""
    groups = ("algorithm.name=grpo", "rollout.prompts_per_step=4", "rollout.responses_per_prompt=4")
    sampling = ("rollout.engine=vllm", "rollout.temperature=1.5")
    mssr("train", warm, run.override, *sampling, *groups, "train.steps=1").check()
    rollouts = run.rollouts(1)
    for start in range(0, 16, 4):
        group = rollouts[start : start + 4]
        assert len({rollout["row"] for rollout in group}) == 1
        assert len({rollout["response"] for rollout in group}) > 1
    assert run.metrics[1]["rollout/logp_gap_max"] < 1e-4


@pytest.mark.slow("20 s: two commands that start vLLM")
def test_a_killed_run_goes_on_as_if_it_had_not_been(mssr, warm, run, settings, whole_with_vllm):
    """This includes sampling noise and the order of requests."""
    first = mssr("train", warm, run.override, *settings, at=Moment("os.mkdir", "rollouts/.partial_step_000005"))
    assert first.code == KILLED and "step_000002" in run.checkpoints  # step 4's may be unfinished
    mssr("train", warm, run.override, *settings, "--resume").check()
    run.assert_same_as(whole_with_vllm)
