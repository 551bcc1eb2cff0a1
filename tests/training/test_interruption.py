"""SIGTERM and SIGUSR1 save and end the run; when resumed, it equals an uninterrupted run."""

import pytest
from mssr_process import Moment
from run_folder import RunFolder


@pytest.mark.parametrize(("sent", "name", "code"), [("term", "SIGTERM", 143), ("usr1", "SIGUSR1", 138)])
def test_a_signal_saves_at_the_steps_end(mssr, warm, run, whole, sent, name, code):
    ended = mssr("train", warm, run.override, at=Moment("os.mkdir", "rollouts/.partial_step_000003", sent))
    assert ended.code == code
    assert ended.err.splitlines()[-1] == f"mssr: {name}: saved step 3; go on with --resume"
    assert run.checkpoints == ["step_000002", "step_000003"]
    mssr("train", warm, run.override, "--resume").check()
    run.assert_same_as(whole)


def test_a_signal_before_the_first_step_saves_the_trackers_start(mssr, warm, run):
    """The first rollouts, of every prompt, may take longer than any step."""
    settings = ["algorithm.tracker.n_init=1", "train.steps=2"]
    ended = mssr("train", warm, run.override, *settings, at=Moment("open", "metrics.jsonl", "term"))
    assert ended.code == 143 and ended.err.splitlines()[-1] == "mssr: SIGTERM: saved step 0; go on with --resume"
    assert run.checkpoints == ["step_000000"] and [line["step"] for line in run.metrics] == [0]
    mssr("train", warm, run.override, *settings, "--resume").check()
    uninterrupted = RunFolder(run.path.with_name("uninterrupted"))
    mssr("train", warm, uninterrupted.override, *settings).check()
    run.assert_same_as(uninterrupted)


def test_a_signal_sent_twice_is_one(mssr, warm, run):
    """This happens when a launcher forwards a signal that its whole process group received."""
    ended = mssr("train", warm, run.override, at=Moment("os.mkdir", "rollouts/.partial_step_000001", "twice"))
    assert ended.code == 143 and run.checkpoints == ["step_000001"]


def test_one_ranks_signal_ends_all(mssr, warm, run):
    ranks = mssr.ranks(2, "train", warm, run.override, at=Moment("os.mkdir", "rollouts/.partial_step_000001", "usr1"))
    assert [ended.code for ended in ranks] == [138, 138]
    assert run.checkpoints == ["step_000001"]


def test_a_rank_that_is_killed_ends_the_other_with_an_error(mssr, warm, run):
    killed, other = mssr.ranks(2, "train", warm, run.override, at=Moment("os.mkdir", "rollouts/.partial_step_000001"))
    assert killed.code == -9
    assert other.code not in (0, None) and "Connection closed by peer" in other.err
