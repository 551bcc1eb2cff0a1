"""Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP save and end the run; when resumed, it equals an uninterrupted run."""

import os
import queue
import signal
from contextlib import contextmanager

import pytest
import torch
from mssr_process import Moment
from run_folder import RunFolder

from mssr.config import load_config
from mssr.distributed import ALONE, World
from mssr.errors import Interrupted
from mssr.training import interruption
from mssr.training.interruption import Interruptions
from mssr.training.run import Run
from mssr.training.same_run import SameRun
from mssr.training.session import Session


@pytest.mark.parametrize(
    ("sent", "name", "code"), [("int", "SIGINT", 130), ("term", "SIGTERM", 143), ("usr1", "SIGUSR1", 138)]
)
def test_a_signal_saves_at_the_steps_end(mssr, warm, run, whole, sent, name, code):
    ended = mssr("train", warm, run.override, at=Moment("os.mkdir", "rollouts/.partial_step_000003", sent))
    assert ended.code == code
    announced, saved = ended.err.splitlines()
    assert announced.startswith(f"mssr: {name}: the run saves and ends at the end of this step")
    assert saved == f"mssr: {name}: saved step 3; go on with --resume"
    assert run.checkpoints == ["step_000002", "step_000003"]
    mssr("train", warm, run.override, "--resume").check()
    run.assert_same_as(whole)


def test_ctrl_c_that_ends_the_reader_of_the_output_too(mssr, warm, run):
    """As in `mssr train ... | tee log`."""
    ended = mssr("train", warm, run.override, at=Moment("os.mkdir", "rollouts/.partial_step_000003", "tee"))
    assert ended.code == 130 and run.checkpoints == ["step_000002", "step_000003"]


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


def test_ctrl_c_before_the_first_step_ends_the_run_at_once(mssr, warm, run):
    """Then the same command starts it again."""
    settings = ["algorithm.tracker.n_init=1", "train.steps=1"]
    ended = mssr("train", warm, run.override, *settings, at=Moment("open", "metrics.jsonl", "int"))
    assert ended.code == 130
    assert ended.err == "mssr: SIGINT: ended before the first step; nothing was there to save\n"
    assert not (run.path / "metrics.jsonl").exists() and not (run.path / "checkpoints").exists()
    mssr("train", warm, run.override, *settings).check()


def test_ctrl_c_while_the_model_is_written_leaves_the_last_step(mssr, warm, run, whole):
    ended = mssr("train", warm, run.override, at=Moment("os.mkdir", ".partial_model", "int"))
    assert ended.code == 130
    assert ended.err == "mssr: SIGINT: ended; all steps are saved, and --resume writes the model\n"
    mssr("train", warm, run.override, "--resume").check()
    run.assert_same_as(whole)


@pytest.fixture
def ends(monkeypatch):
    """Numbers of the signals that would have ended this process at once."""
    numbers = queue.Queue()
    monkeypatch.setattr(interruption, "end_now", numbers.put)
    return numbers


def test_a_second_ctrl_c_ends_the_process_while_the_first_one_waits(ends, monkeypatch, capsys):
    monkeypatch.setattr(interruption, "AFTER_CTRL_C_S", 0.0)
    with pytest.raises(Interrupted), Interruptions(ALONE) as interruptions, interruptions.steps():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert ends.get(timeout=60) == signal.SIGINT
    assert capsys.readouterr().err.count("mssr: SIGINT: the run saves and ends at the end of this step") == 1


@pytest.mark.parametrize(("handler", "asked"), [(signal.SIG_DFL, signal.SIGHUP), (signal.SIG_IGN, 0)])
def test_a_closed_terminal_is_a_signal_except_after_nohup(handler, asked):
    before = signal.signal(signal.SIGHUP, handler)
    try:
        with Interruptions(ALONE) as interruptions, interruptions.steps():
            os.kill(os.getpid(), signal.SIGHUP)
            assert interruptions.asked() == asked
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_process_ends_at_once_even_if_nobody_reads_why(monkeypatch):
    def gone(*_):
        raise BrokenPipeError

    codes = []
    monkeypatch.setattr(interruption.os, "write", gone)
    monkeypatch.setattr(interruption.os, "_exit", codes.append)
    interruption.end_now(signal.SIGINT)
    monkeypatch.undo()
    assert codes == [130]


@pytest.fixture
def session(material, single_process, tmp_path):
    """Opens a session of a new run, or of one that has saved a step."""

    @contextmanager
    def open_session(command, saved):
        config = load_config(material / "config.yaml", [f"run_dir={tmp_path}"])
        if saved is not None:
            folder = tmp_path / "checkpoints" / f"step_{saved:06d}"
            folder.mkdir(parents=True, exist_ok=True)
            same = SameRun(command, config).state_dict("data")
            torch.save({"step": saved, "ranks": 1, "engine": {}, "best": None, "same_run": same}, folder / "state.pt")
        with Run(config) as run, Session(run, command, resume=saved is not None) as opened:
            yield opened

    return open_session


def test_ctrl_c_ends_a_rank_that_waits_for_another(ends, monkeypatch, capsys):
    monkeypatch.setattr(interruption, "RANKS_END_S", 0.0)
    with pytest.raises(Interrupted), Interruptions(World(0, 2, torch.device("cpu"))):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            assert ends.get(timeout=60) == signal.SIGINT
            raise
    assert "mssr: SIGINT: the run ends, within 0 s on every rank\n" in capsys.readouterr().err


@pytest.mark.parametrize("command, saved, how", [
    ("train", None, "saves and ends before the first step"),
    ("train", 4, "saves and ends after one step"),
    ("sft", None, "saves and ends after one step"),
])  # fmt: skip
def test_what_a_signal_before_the_steps_and_after_them_does(session, capsys, command, saved, how):
    with session(command, saved) as opened:
        os.kill(os.getpid(), signal.SIGUSR1)
    assert capsys.readouterr().err == f"mssr: SIGUSR1: the run {how}\n"
    with session(command, saved) as opened:
        with opened.steps():
            pass
        os.kill(os.getpid(), signal.SIGUSR1)
    assert capsys.readouterr().err == "mssr: SIGUSR1: the run ends when the model is saved\n"


def test_ctrl_c_after_the_loop_asked_for_the_last_time(session):
    everything_saved = pytest.raises(Interrupted, match="SIGINT: ended; all steps are saved")
    with everything_saved, session("train", None) as opened, opened.steps():
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("during", [True, False])
def test_ctrl_c_while_step_0_is_saved(session, monkeypatch, during):
    """The first signal saves it; Ctrl-C then ends the run at once."""

    def ctrl_c(*_, **__):
        os.kill(os.getpid(), signal.SIGINT)

    told = "ended while step 0 was saved" if during else "ended; step 0 is saved, go on with --resume"
    with pytest.raises(Interrupted, match=f"SIGINT: {told}"), session("train", None) as opened:
        opened._parts, opened._data, opened._engine = {}, "data", None
        monkeypatch.setattr(opened.checkpoints, "save", ctrl_c if during else lambda *_, **__: None)
        os.kill(os.getpid(), signal.SIGTERM)
        try:
            opened.save_and_end_if_asked(0)
        finally:
            if not during:
                ctrl_c()


def test_what_ctrl_c_outside_of_the_steps_breaks_is_not_shown(monkeypatch):
    """The handlers that were there before come back."""
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="nothing was there to save"), Interruptions(ALONE):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise RuntimeError("Connection closed by peer") from None
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_sent_twice_is_one(mssr, warm, run):
    """This happens when a launcher forwards a signal that its whole process group received."""
    ended = mssr("train", warm, run.override, at=Moment("os.mkdir", "rollouts/.partial_step_000001", "twice"))
    assert ended.code == 143 and run.checkpoints == ["step_000001"]


def test_one_ranks_signal_ends_all(mssr, warm, run):
    ranks = mssr.ranks(2, "train", warm, run.override, at=Moment("os.mkdir", "rollouts/.partial_step_000001", "usr1"))
    assert [ended.code for ended in ranks] == [138, 138]
    assert [ended.err.count("saved step 1") for ended in ranks] == [1, 0]
    assert run.checkpoints == ["step_000001"]


def test_a_rank_that_is_killed_ends_the_other_with_an_error(mssr, warm, run):
    killed, other = mssr.ranks(2, "train", warm, run.override, at=Moment("os.mkdir", "rollouts/.partial_step_000001"))
    assert killed.code == -9
    # Whether the other rank was reading or writing decides the rest of gloo's message.
    assert other.code not in (0, None) and "remote worker" in other.err, other.err
