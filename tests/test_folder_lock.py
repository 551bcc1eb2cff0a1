"""One process at a time in a run's folder, and a lock that ends with its process."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

from mssr import folder_lock
from mssr.errors import UserError
from mssr.folder_lock import LOCK, locked

HOLD = """
import sys
from pathlib import Path
from mssr.folder_lock import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of `tmp_path/run`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def short_beats(monkeypatch):
    monkeypatch.setattr(folder_lock, "BEAT_S", 0.02)


def test_another_process_is_refused_by_host_and_process(tmp_path, holder):
    with pytest.raises(UserError) as refused, locked(tmp_path / "run"):
        pass
    assert str(refused.value).startswith(
        f"run_dir {tmp_path / 'run'}: in use by process {holder.pid} on {socket.gethostname()} (since "
    )
    holder.communicate("")  # it ends
    assert holder.returncode == 0 and not (tmp_path / "run").exists()
    with locked(tmp_path / "run"):
        pass


def test_a_kill_releases_it_at_once(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / LOCK).exists()
    with locked(tmp_path / "run"):  # without the minute that another host's lock takes
        assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_child_that_outlives_its_parent_does_not_keep_it(tmp_path):
    forked = HOLD.replace('print("locked", flush=True)', 'import os; os.write(1, b"%d\\n" % os.fork())')
    process = subprocess.Popen(
        [sys.executable, "-c", forked, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    lines = {process.stdout.readline(), process.stdout.readline()}
    (child,) = (int(line) for line in lines - {"0\n"})
    process.kill()  # the child lives on: its input is open
    process.wait()
    os.kill(child, 0)
    with locked(tmp_path / "run"):
        pass
    process.communicate()  # and the child ends


def left_by_another_host(folder, **changes):
    folder.mkdir()
    entry = {"host": "gpu7", "pid": 123, "boot": "another", "since": "2026-01-02 03:04:05"} | changes
    (folder / LOCK).write_text(json.dumps(entry))
    return folder / LOCK


def test_another_hosts_lock_is_watched_and_taken_if_nobody_touches_it(tmp_path, short_beats, capsys):
    lock = left_by_another_host(tmp_path / "run")
    with locked(tmp_path / "run"):
        assert json.loads(lock.read_text())["pid"] == os.getpid()
    assert "left locked by process 123 on gpu7 (since 2026-01-02 03:04:05)" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[1]", "7", '{"host": "gpu7"}', "no JSON"])
def test_a_lock_of_something_else_is_an_unknown_process(tmp_path, short_beats, capsys, content):
    left_by_another_host(tmp_path / "run").write_text(content)
    with locked(tmp_path / "run"):
        pass
    assert "left locked by an unknown process" in capsys.readouterr().err


def test_a_file_system_that_fails_at_the_end_is_no_error_of_the_run(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise OSError(116, "Stale file handle")

    with locked(tmp_path / "run"):
        monkeypatch.setattr("pathlib.Path.unlink", fails)
    monkeypatch.undo()
    with locked(tmp_path / "run"):  # it is released
        pass


def test_another_hosts_lock_that_is_touched_is_respected(tmp_path, short_beats, monkeypatch):
    lock = left_by_another_host(tmp_path / "run")
    monkeypatch.setattr(folder_lock.time, "sleep", lambda seconds: os.utime(lock))
    with pytest.raises(UserError, match="in use by process 123 on gpu7"), locked(tmp_path / "run"):
        pass
    assert json.loads(lock.read_text())["host"] == "gpu7"


def test_a_process_that_was_stopped_until_another_took_the_folder_ends(tmp_path, short_beats, monkeypatch, capfd):
    ended = threading.Event()
    monkeypatch.setattr(folder_lock.os, "_exit", lambda code: ended.set())
    with locked(tmp_path / "run"):
        lock = tmp_path / "run" / LOCK
        lock.write_text(json.dumps({"host": "gpu8", "pid": 9, "since": "now"}))
        assert ended.wait(60)
    assert "run: process 9 on gpu8 (since now) took it while this process was stopped" in capfd.readouterr().err
    assert json.loads(lock.read_text())["pid"] == 9


def test_of_two_that_take_the_same_lock_the_last_has_it(tmp_path, short_beats, monkeypatch):
    """On a file system where flocks do not reach other hosts."""
    lock, slept = left_by_another_host(tmp_path / "run"), []

    def sleep(seconds):
        slept.append(seconds)
        if json.loads(lock.read_text())["pid"] == os.getpid():
            lock.write_text(json.dumps({"host": "gpu8", "pid": 9, "since": "now"}))

    monkeypatch.setattr(folder_lock.time, "sleep", sleep)
    with pytest.raises(UserError, match="in use by process 9 on gpu8"), locked(tmp_path / "run"):
        pass
    assert len(slept) == folder_lock.BEATS + 1


def test_without_flock_the_beats_decide(tmp_path, short_beats, monkeypatch):
    def none(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(folder_lock.fcntl, "flock", none)
    beaten, utime = threading.Event(), os.utime
    monkeypatch.setattr(folder_lock.os, "utime", lambda descriptor: (utime(descriptor), beaten.set()))
    with locked(tmp_path / "run"):
        monkeypatch.setattr(folder_lock.time, "sleep", lambda _: (beaten.clear(), beaten.wait(60)))
        with pytest.raises(UserError, match=f"in use by process {os.getpid()}"), locked(tmp_path / "run"):
            pass
    assert not (tmp_path / "run").exists()


def test_a_folder_with_files_stays(tmp_path):
    with locked(tmp_path / "new" / "run"):
        (tmp_path / "new" / "run" / "metrics.jsonl").touch()
    assert [path.name for path in (tmp_path / "new" / "run").iterdir()] == ["metrics.jsonl"]
