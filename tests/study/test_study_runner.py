"""The study's runner with short commands instead of training: what it records, repeats and stops."""

import concurrent.futures
import json
import os
import signal
import sys

import pytest
import yaml

from bench.study import runner as runner_module
from bench.study.grid import PlannedRun
from bench.study.runner import Runner, signals_raise, sole_user, still_to_run
from mssr.config import validate_config
from mssr.errors import Interrupted, UserError

# A run on two ranks that, like training, saves and ends on SIGTERM. It opens the pipe when both ranks wait for the signal.
RANKS = """
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
other = os.fork()
if other:
    open(sys.argv[1], "w").close()
if signal.sigtimedwait([signal.SIGTERM], 30):
    os.write(1, b"rank 0 saved\\n" if other else b"rank 1 saved\\n")  # whole lines, without buffering
if other:
    os.wait()
    sys.exit(143)
"""
# A run that hangs: on SIGTERM it only writes to the second pipe.
DEAF = """
import signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
open(sys.argv[1], "w").close()
asked = signal.sigtimedwait([signal.SIGTERM], 30)
with open(sys.argv[2], "w") as pipe:
    pipe.write("asked" if asked else "not asked")
signal.sigtimedwait([signal.SIGINT], 30)
"""


@pytest.fixture
def plan(tmp_path):
    def plan(arm, **keys) -> PlannedRun:
        folder = tmp_path / "out" / "runs" / arm / "seed_5"
        given = {"run_dir": str(folder), "model": {"path": "unused"}, "data": {"train": "unused"}}
        return PlannedRun(arm, 5, folder, [f"arm={arm}"], validate_config(given | keys), started=False)

    return plan


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return `run([(planned run, command), ...])`, which runs the study and returns arm -> outcome. on_end: of the runner."""

    def run(commands, on_end=lambda _: None):
        by_arm = {planned.arm: command for planned, command in commands}
        monkeypatch.setattr(
            runner_module, "train_command", lambda file, overrides, ranks: by_arm[overrides[0].split("=")[1]]
        )
        todo = still_to_run([planned for planned, _ in commands])
        with sole_user(tmp_path / "out") as lock:
            outcomes = Runner(tmp_path / "config.yaml", 2, 1, on_end).run(todo, lock)
        return {outcome.run.arm: outcome for outcome in outcomes}

    return run


def shell(script):
    return ["sh", "-c", script]


def attempts(planned):
    return [json.loads(line) for line in (planned.folder / "attempts.jsonl").read_text().splitlines()]


def finished(planned):
    path = planned.folder / "finished.json"
    return json.loads(path.read_text()) if path.exists() else None


def test_a_failed_run_is_named_and_repeated_until_it_ends(plan, run):
    base = plan("base")
    failed = run([(base, shell("echo 'mssr: no such file'; echo torchrun says more; exit 2"))])["base"]
    assert (failed.end, failed.line) == ("failed", "no such file")
    killed = run([(base, shell("echo step 1; kill -9 $$"))])["base"]
    assert (killed.end, killed.line) == ("failed", "step 1")  # not the reason of the attempt before
    assert [attempt["code"] for attempt in attempts(base)] == [2, -signal.SIGKILL]
    assert finished(base) is None

    assert run([(base, shell("echo step 2"))])["base"].end == "budget"
    assert [attempt["code"] for attempt in attempts(base)] == [2, -signal.SIGKILL, 0]
    assert (finished(base)["end"], finished(base)["attempts"], finished(base)["line"]) == ("budget", 3, "")


def test_what_a_run_cost_is_that_of_all_its_attempts(plan, run):
    base = plan("base")
    base.folder.mkdir(parents=True)
    (base.folder.parents[2] / ".lock").touch()  # the study ran before
    before = {"code": 143, "wall_seconds": 7200.0, "cpu_seconds": 3600.0}
    (base.folder / "attempts.jsonl").write_text(json.dumps(before) + "\n")
    command = shell("true")
    run([(base, command)])
    assert finished(base)["attempts"] == 2
    last = attempts(base)[1]
    assert finished(base)["wall_seconds"] == round(7200 + last["wall_seconds"], 2)
    assert finished(base)["cpu_seconds"] == round(3600 + last["cpu_seconds"], 2)
    assert finished(base)["command"] == command[1:]


def test_a_cut_record_of_attempts_is_named_before_anything_starts(plan, run):
    base, other = plan("base"), plan("other")
    run([(other, shell("exit 1"))])
    record = other.folder / "attempts.jsonl"
    record.write_bytes(record.read_bytes()[:-5])
    with pytest.raises(UserError, match=f"^{record}, line 1: damaged; remove the line, and run the study again"):
        run([(base, shell("true")), (other, shell("true"))])
    assert finished(base) is None
    record.write_bytes(b"")
    assert run([(base, shell("true")), (other, shell("true"))])["other"].end == "budget"


def test_runs_that_ended_by_budget_or_diverged_are_not_run_again(plan, run):
    base, wild, broken = plan("base"), plan("wild"), plan("broken")
    commands = [
        (base, shell("true")),
        (wild, shell("echo 'mssr: step 3: the loss is nan'; exit 3")),
        (broken, shell("exit 1")),
    ]
    told = []
    outcomes = run(commands, on_end=lambda outcome: told.append(outcome.run.name))
    assert {arm: outcome.end for arm, outcome in outcomes.items()} == {
        "base": "budget",
        "wild": "diverged",
        "broken": "failed",
    }
    assert sorted(told) == ["base seed 5", "broken seed 5", "wild seed 5"]
    assert outcomes["broken"].line == "no output"
    assert (finished(wild)["end"], finished(wild)["line"]) == ("diverged", "step 3: the loss is nan")
    assert run(commands).keys() == {"broken"}
    assert [len(attempts(planned)) for planned in (base, wild, broken)] == [1, 1, 2]


def test_a_signal_lets_every_rank_save_and_the_run_can_go_on(plan, run, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    quick, long = plan("quick"), plan("long")
    # quick ends when long waits for its signal, which is sent to this process, as with Ctrl-C.
    commands = [
        (quick, ["timeout", "30", "cat", str(pipe)]),
        (long, [sys.executable, "-S", "-c", RANKS, str(pipe)]),
    ]
    with (
        signals_raise(),
        pytest.raises(Interrupted, match="SIGTERM: runs were stopped; the same command continues them"),
    ):
        run(commands, on_end=lambda _: signal.raise_signal(signal.SIGTERM))
    assert finished(quick)["end"] == "budget"
    assert sorted((long.folder / "log.txt").read_text().splitlines()) == ["rank 0 saved", "rank 1 saved"]
    assert [attempt["code"] for attempt in attempts(long)] == [143]
    assert still_to_run([quick, long]) == [long]
    with sole_user(tmp_path / "out"):  # no process that writes there is left
        pass


def test_a_run_that_does_not_end_in_time_is_killed(plan, run, tmp_path, monkeypatch):
    pipe, second = tmp_path / "pipe", tmp_path / "second"
    os.mkfifo(pipe)
    os.mkfifo(second)
    asked = []

    def wait(futures, timeout=None, **options):
        """Return as soon as the run has received SIGTERM, instead of waiting for the whole grace period."""
        if timeout is not None:
            asked.append(second.read_text())
            timeout = 0
        return concurrent.futures.wait(futures, timeout, **options)

    def stop(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner_module, "wait", wait)
    quick, deaf = plan("quick"), plan("deaf")
    commands = [
        (quick, ["timeout", "30", "cat", str(pipe)]),
        (deaf, [sys.executable, "-S", "-c", DEAF, str(pipe), str(second)]),
    ]
    with pytest.raises(KeyboardInterrupt):
        run(commands, on_end=stop)
    assert asked == ["asked"]
    assert [attempt["code"] for attempt in attempts(deaf)] == [-signal.SIGKILL]
    assert finished(deaf) is None


def test_a_folder_with_another_configuration_is_refused_before_anything_starts(plan, run):
    first, base = plan("first"), plan("base", seed=5)
    base.folder.mkdir(parents=True)
    (base.folder.parents[2] / ".lock").touch()  # the study ran before
    there = base.config.model_dump(mode="json") | {"seed": 6, "run_dir": "moved/since"}
    (base.folder / "config.yaml").write_text(yaml.safe_dump(there))
    with pytest.raises(UserError, match="arm base, seed 5: seed is 5, the run in .* had 6; remove that folder"):
        run([(first, shell("true")), (base, shell("true"))])
    assert not first.folder.exists()
    (base.folder / "config.yaml").write_text(yaml.safe_dump(there | {"seed": 5}))  # another folder, but the same run
    assert run([(base, shell("true"))])["base"].end == "budget"
