"""One process at a time in a run's folder: `run_dir/.mssr_lock` names the host and the process that uses it.

The holder has an flock on the file, which the kernel drops when the process ends, however it ends. Some shared file systems
keep flocks to one host. Therefore the holder also touches the file every BEAT_S seconds; a process on another host that
gets the flock waits until it sees the file touched (then the folder is in use) or has seen it untouched for BEATS beats.
A holder that was stopped for longer (a suspended job, a server that did not answer) finds another's name, and ends at once.
"""

import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mssr.errors import UserError

LOCK = ".mssr_lock"
BEAT_S = 10.0
BEATS = 6

_held: set[int] = set()  # descriptors; a forked child must not keep the lock when this process has ended


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Context in which only this process uses the folder, which is made if needed; and removed again if still empty.

    Raises:
        UserError: another process uses it; names host and process.
        OSError: the folder cannot be written.
    """
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path, owner = folder / LOCK, os.getpid()
    try:
        descriptor = _acquire(path)
        _held.add(descriptor)
        ours, ended = _read(descriptor), threading.Event()
        beats = threading.Thread(target=_beat, args=(descriptor, path, ours, ended), name="folder_lock", daemon=True)
        beats.start()
        try:
            yield
        finally:
            if os.getpid() == owner:
                ended.set()
                beats.join()
                with suppress(OSError):  # a file system that fails: what the run did counts
                    if _is_at(descriptor, path) and _read(descriptor) == ours:
                        path.unlink()
                _held.discard(descriptor)
                with suppress(OSError):
                    os.close(descriptor)
    finally:
        with suppress(OSError):  # not empty
            for each in made:
                each.rmdir()


def _acquire(path: Path) -> int:
    """Return the descriptor that holds the lock."""
    while True:
        descriptor, created = _open(path)
        if descriptor is None:
            continue
        try:
            if _is_free(path, descriptor, created):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _open(path: Path) -> tuple[int | None, bool]:
    """Open the lock file. Return the descriptor, and whether it is new; None: it vanished just now."""
    with suppress(FileExistsError):
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644), True
    with suppress(FileNotFoundError):
        return os.open(path, os.O_RDWR | os.O_NOFOLLOW), False
    return None, False


def _is_free(path: Path, descriptor: int, created: bool) -> bool:
    """Lock the open file and write this process's name into it; return False if another file has taken its place.

    Raises:
        UserError: another process holds the lock.
    """
    has_locks = True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
            raise _in_use(path, _read(descriptor)) from None
        has_locks = False  # none on this file system: the beats decide
    if not _is_at(descriptor, path):
        return False
    holder, us = _read(descriptor), _this_process()
    elsewhere = not created and not (has_locks and holder.get("boot") == us["boot"])
    if elsewhere and _beats(path, holder):
        raise _in_use(path, holder)
    if not _is_at(descriptor, path):
        return False
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(us).encode(), 0)
    os.fsync(descriptor)
    if elsewhere:
        time.sleep(BEAT_S)  # a third host may have waited beside us; the last to write has the lock
        with path.open("rb") as opened:
            if (holder := _read(opened.fileno())) != us:
                raise _in_use(path, holder)
    return True


def _beats(path: Path, holder: dict) -> bool:
    """Watch whether the holder still touches its lock. Clocks of hosts differ, so only a change counts."""
    beats = BEATS if holder else 1  # without a name: it wrote it a moment later, or was killed before
    print(
        f"mssr: {path.parent} was left locked by {_named(holder)}; watching for {BEAT_S * beats:.0f} s whether it lives",
        file=sys.stderr,
        flush=True,
    )
    first = _touched(path)
    for _ in range(beats):
        time.sleep(BEAT_S)
        if _touched(path) != first:
            return first is not None and path.exists()
    return False


def _touched(path: Path) -> int | None:
    """Return the file's modification time; None: it is gone. Opens it, since NFS caches what `stat` returns."""
    try:
        with path.open("rb") as opened:
            return os.fstat(opened.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _beat(descriptor: int, path: Path, ours: dict, ended: threading.Event) -> None:
    while not ended.wait(BEAT_S):
        try:
            holder = _read(descriptor)
            if holder in (ours, {}):
                os.utime(descriptor)
                continue
        except OSError:  # a file system that fails for a while
            continue
        text = f"mssr: {path.parent}: {_named(holder)} took it while this process was stopped; ended at once\n"
        with suppress(OSError):
            os.write(2, text.encode())
        os._exit(1)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _read(descriptor: int) -> dict:
    """Return what its holder wrote; empty if it is nothing of ours."""
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) and {"host", "pid", "since"} <= holder.keys() else {}


def _this_process() -> dict:
    return {"host": socket.gethostname(), "pid": os.getpid(), "boot": this_machine(), "since": time.strftime("%F %T")}


def this_machine() -> str:
    """Return what identifies this run of the kernel, since other machines may have the same host name."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


def _named(holder: dict) -> str:
    if not holder:
        return "an unknown process"
    return f"process {holder['pid']} on {holder['host']} (since {holder['since']})"


def _in_use(path: Path, holder: dict) -> UserError:
    return UserError(
        f"run_dir {path.parent}: in use by {_named(holder)}; wait for it or end it, or set another run_dir"
    )


def _leave_to_parent() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_leave_to_parent)
