"""A killed run that is resumed equals one that was never interrupted: every metric, every bit of the weights."""

import os
import random
import shutil

import pytest
import torch
from mssr_process import Moment

KILLED = -9
IN_TURN = "train.async_save=false"  # so that a checkpoint is valid before the next step
FILE_OPERATIONS = 100  # a run makes at least so many in its folder


def kill_at(mssr, config, run, moment, *overrides):
    ended = mssr("train", config, run.override, *overrides, "--resume", at=moment)
    assert ended.code == KILLED, f"{moment} did not happen: {ended.err}"
    return ended.out


def test_killed_again_and_again(mssr, warm, run, whole):
    first = mssr("train", warm, run.override, IN_TURN, at=Moment("os.mkdir", "rollouts/.partial_step_000001"))
    assert first.code == KILLED and len(run.metrics) == 2  # before the first checkpoint: the run starts over
    lost = (run.path / "metrics.jsonl").read_bytes()
    said = kill_at(mssr, warm, run, Moment("open", ".partial_step_000002/rank_0.pt"), IN_TURN)  # a save has just begun
    assert f"starts at step 1; metrics of the earlier attempt are now in {run.path}/metrics.jsonl.1\n" in said
    assert run.checkpoints == [".partial_step_000002"]
    assert (run.path / "metrics.jsonl.1").read_bytes() == lost
    kill_at(mssr, warm, run, Moment("os.rename", ".partial_step_000002"), IN_TURN)  # all is written, but not yet valid
    # Killed at the end of an epoch, before its checkpoint; then resumed from the checkpoint at that end.
    kill_at(mssr, warm, run, Moment("os.mkdir", "rollouts/.partial_step_000004"), IN_TURN)
    assert run.checkpoints == ["step_000002"]
    said = kill_at(mssr, warm, run, Moment("os.mkdir", "rollouts/.partial_step_000005"), IN_TURN)
    assert "goes on after step 2; 2 later lines of metrics.jsonl are dropped, their steps come again\n" in said
    assert run.checkpoints == ["step_000002", "step_000004"]
    kill_at(mssr, warm, run, Moment("os.remove", "state.pt"), IN_TURN)  # an old checkpoint half removed
    assert run.checkpoints == [".partial_step_000002", "step_000004", "step_000006"]
    kill_at(mssr, warm, run, Moment("os.rename", ".partial_model"), IN_TURN)  # only the export is missing
    assert not (run.path / "model").exists()
    mssr("train", warm, run.override, IN_TURN, "--resume").check()
    run.assert_same_as(whole)


def test_killed_with_every_state_there_is(mssr, warm, run, everything, whole_with_everything):
    first = mssr("train", warm, run.override, *everything, at=Moment("os.mkdir", "rollouts/.partial_step_000006"))
    assert first.code == KILLED
    mssr("train", warm, run.override, *everything, "--resume").check()
    run.assert_same_as(whole_with_everything)


MORE = pytest.mark.slow("2 s each: more moments")


@pytest.mark.parametrize("number", [*range(2), *(pytest.param(number, marks=MORE) for number in range(2, 20))])
def test_killed_at_any_moment(mssr, warm, run, whole, number):
    """kill -9 at a random file operation in the folder of a run that saves at every step."""
    often = ["train.checkpoint_every=1", "train.async_save=" + ("true" if number % 2 else "false")]
    nth = random.Random(number).randint(1, FILE_OPERATIONS)
    first = mssr("train", warm, run.override, *often, at=Moment("", str(run.path), nth=nth))
    assert first.code == KILLED, first.err
    mssr("train", warm, run.override, *often, "--resume").check()
    run.assert_same_as(whole)


def test_a_line_of_metrics_that_a_kill_tore(mssr, warm, run, whole):
    killed = mssr("train", warm, run.override, at=Moment("os.mkdir", "rollouts/.partial_step_000004"))
    assert killed.code == KILLED
    metrics = run.path / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes() + b'{"step": 4, "ti')
    mssr("train", warm, run.override, "--resume").check()
    run.assert_same_as(whole)


@pytest.fixture
def copy_of_whole(whole, run):
    shutil.copytree(whole.path, run.path)
    return run


def test_resuming_a_finished_run_changes_nothing(mssr, warm, copy_of_whole, whole):
    said = mssr("train", warm, copy_of_whole.override, "--resume").check().out
    assert "the run has ended after step 6: train.steps is 6; raise it to train on" in said
    copy_of_whole.assert_same_as(whole)
    assert copy_of_whole.checkpoints == whole.checkpoints


def test_fewer_steps_than_are_done_are_said(mssr, warm, copy_of_whole, whole):
    said = mssr("train", warm, copy_of_whole.override, "train.steps=4", "--resume").check().out
    assert "--resume: other settings than before: train.steps 4 (was 6)" in said
    assert "the run has ended after step 6: train.steps is 4" in said
    copy_of_whole.assert_same_as(whole)


def test_leftovers_of_a_kill_are_no_checkpoint(mssr, warm, copy_of_whole, whole):
    """The checkpoint of step 6 is half-written, so that the run resumes from step 4."""
    checkpoints = copy_of_whole.path / "checkpoints"
    (checkpoints / "step_000006").rename(checkpoints / ".partial_step_000006")
    (checkpoints / ".partial_step_000006" / "state.pt").write_bytes(b"half")
    shutil.rmtree(copy_of_whole.path / "model")
    mssr("train", warm, copy_of_whole.override, "--resume").check()
    copy_of_whole.assert_same_as(whole)
    assert copy_of_whole.checkpoints == whole.checkpoints


def test_more_steps_go_on_where_the_run_ended(mssr, warm, run, whole):
    mssr("train", warm, run.override, "train.steps=3").check()
    mssr("train", warm, run.override, "--resume").check()
    assert [line for line in run.metrics if line["step"] in (1, 2, 4, 5)] == [
        line for line in whole.metrics if line["step"] in (1, 2, 4, 5)
    ]


@pytest.mark.parametrize(
    "override, words",
    [
        ("seed=7", ["seed is 7", "had 0"]),
        ("rollout.prompts_per_step=32", ["rollout.prompts_per_step is 32", "had 16"]),
        ("rollout.responses_per_prompt=2", ["rollout.responses_per_prompt is 2", "had 1"]),
        ("model.path={untrained}", ["model.path", "is not the model that the checkpoint's run started from"]),
        ("data.instruction=Why?", ["data.instruction is 'Why?'", "had 'Box the answer.'"]),
        ("data.max_pixels=6272", ["data.max_pixels is 6272", "had 12544"]),
        ("data.train={val}", ["data.train", "not what the checkpoint was trained on"]),
        ("algorithm.tracker.rho_min=0.5", ["rho_min"]),
    ],
)
def test_what_would_be_another_run_is_refused(mssr, warm, whole, override, words):
    before = snapshot(whole.path)
    override = override.format(val=warm.parent / "data" / "val.parquet", untrained=warm.parent / "untrained")
    line = mssr("train", warm, whole.override, "--resume", override).line
    assert all(word in line for word in words), line
    assert snapshot(whole.path) == before


def test_the_start_and_the_data_may_have_moved(mssr, warm, copy_of_whole, whole, tmp_path):
    model = shutil.copytree(warm.parent / "sft" / "model", tmp_path / "moved")
    data = shutil.copy(warm.parent / "data" / "train.parquet", tmp_path / "moved.parquet")
    said = (
        mssr("train", warm, copy_of_whole.override, f"model.path={model}", f"data.train={data}", "--resume").check().out
    )
    assert "other settings" not in said


def test_a_run_of_the_other_command_is_refused(mssr, warm, whole):
    line = mssr("sft", warm, whole.override, "--resume").line
    assert line.startswith(f"run_dir {whole.path} holds a run of `mssr train`")


def test_a_checkpoint_of_an_earlier_version_is_refused(mssr, warm, run):
    mssr("train", warm, run.override, "train.steps=1").check()
    file = run.path / "checkpoints" / "step_000001" / "state.pt"
    state = torch.load(file, weights_only=True)
    del state["best"]
    torch.save(state, file)
    line = mssr("train", warm, run.override, "--resume").line
    assert "saved by an earlier version of mssr" in line


def test_without_resume_an_earlier_run_is_refused_and_kept(mssr, warm, whole):
    before = snapshot(whole.path)
    line = mssr("train", warm, whole.override).line
    assert "--resume" in line and "run_dir" in line
    assert snapshot(whole.path) == before


def test_without_resume_metrics_before_the_first_checkpoint_are_kept_too(mssr, warm, run):
    run.path.mkdir()
    (run.path / "metrics.jsonl").write_text('{"step": 0}\n')
    assert "--resume" in mssr("train", warm, run.override).line
    assert (run.path / "metrics.jsonl").read_text() == '{"step": 0}\n'


def snapshot(folder):
    return {
        path: (path.stat().st_size, path.stat().st_mtime_ns)
        for root, _, files in os.walk(folder)
        for path in (folder.__class__(root) / name for name in files)
    }
