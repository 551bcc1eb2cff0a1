"""What a run may replace in its folder: only what it wrote itself and nobody changed since.

`run_dir/.mssr_outputs.jsonl` has a line per output: its name, and size and modification time of every file in it. An output
is written beside its place, noted, and renamed, so a kill at any moment leaves the earlier one or the new one. Between two
renames an earlier folder has another name (`.replaced_...`); `clear_leftovers` gives it its own name back. Everything else
in the folder belongs to somebody, and is never removed or overwritten.
"""

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from mssr.errors import UserError

RECORD = ".mssr_outputs.jsonl"

Files = dict[
    str, list[int]
]  # path inside the output ("." for an output that is a file) -> size, modification time in ns
ANYTHING = None  # noted for what is ours, whatever is in it
_REPLACED = re.compile(r"\.replaced_(.+)_[0-9a-f]{8}")


def refuse_foreign(run_dir: Path, names: Iterable[str]) -> None:
    """Check that the run may write these outputs: nothing is there, or the run's own, unchanged.

    Raises:
        UserError: something else is there; names it.
    """
    noted = _noted(run_dir)
    for name in names:
        path, states = run_dir / name, noted.get(name, [])
        if ANYTHING in states:
            continue
        if path.is_symlink():
            raise UserError(f"{path}: a symlink, which this run would replace; remove it, or set another run_dir")
        if path.exists() and _files(path) not in [{}, *states]:
            raise UserError(
                f"{path}: not written by this run, or changed since, and this run would replace it; "
                "move it away, or set another run_dir"
            )


def is_foreign(run_dir: Path, name: str) -> bool:
    """Return whether something is there that the run did not write, or that was changed since."""
    try:
        refuse_foreign(run_dir, [name])
    except UserError:
        return True
    return False


def replace(run_dir: Path, name: str, write: Callable[[Path], None]) -> Path:
    """Write the output `run_dir/name`, a file or a folder, and return its path; an earlier one of this run is replaced.

    write: gets a path beside it, where nothing is yet.

    Raises:
        UserError: as `refuse_foreign`.
    """
    refuse_foreign(run_dir, [name])
    final = run_dir / name
    final.parent.mkdir(parents=True, exist_ok=True)
    partial, replaced = _beside(final, "partial"), _beside(final, "replaced")
    note(run_dir, str(partial.relative_to(run_dir)), ANYTHING)
    try:
        write(partial)
        note(run_dir, name, _files(partial))
        if final.is_dir():  # a folder cannot be renamed over another one
            note(run_dir, str(replaced.relative_to(run_dir)), ANYTHING)
            final.rename(replaced)
        try:
            partial.rename(final)
        except BaseException:
            if replaced.exists() and not final.exists():
                replaced.rename(final)
            raise
    finally:
        remove(partial)
    remove(replaced)
    return final


def write_new(path: Path, write: Callable[[Path], None]) -> Path:
    """Write a folder where nothing is yet, or an empty folder; it appears only when it is complete. Return it.

    write: gets a path beside it, where nothing is yet.

    Raises:
        UserError: something is there.
    """
    if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
        raise UserError(f"{path}: already there; name a new folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(path, "partial")
    try:
        write(partial)
        partial.rename(path)
    finally:
        remove(partial)
    return path


def set_aside(path: Path) -> Path | None:
    """Rename what is at `path` to the first free name of `path.1`, `path.2`, ..., and return that; None: nothing is there."""
    if not os.path.lexists(path):
        return None
    number = 1
    while os.path.lexists(kept := path.with_name(f"{path.name}.{number}")):
        number += 1
    path.rename(kept)
    return kept


def clear_leftovers(run_dir: Path) -> None:
    """Remove what a killed process of this run was writing; if it had renamed the earlier output, rename that back."""
    ours = [run_dir / name for name, states in _noted(run_dir).items() if ANYTHING in states]
    for path in ours:
        replaced = _REPLACED.fullmatch(path.name)
        if replaced and os.path.lexists(path) and not os.path.lexists(final := path.with_name(replaced[1])):
            path.rename(final)
    for path in ours:
        if path.name.startswith((".partial_", ".replaced_")):
            remove(path)


def note(run_dir: Path, name: str, files: Files | None) -> None:
    """Append to the record that `run_dir/name` is this run's own: with these files, or whatever is in it."""
    with open(run_dir / RECORD, "a", encoding="utf-8", opener=_no_symlink) as file:
        # After an empty line, so that what a kill tore before ends.
        file.write("\n" + json.dumps({"path": name, "files": files}) + "\n")


def _noted(run_dir: Path) -> dict[str, list[Files | None]]:
    """Return the noted states of every output: a kill between note and rename leaves the one before."""
    try:
        lines = (run_dir / RECORD).read_bytes().splitlines()
    except FileNotFoundError:
        return {}
    noted: dict[str, list[Files | None]] = {}
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:  # empty, or torn by a kill: what it would have noted was not renamed
            continue
        if isinstance(entry, dict) and isinstance(entry.get("path"), str) and "files" in entry:
            noted.setdefault(entry["path"], []).append(entry["files"])
    return noted


def _no_symlink(path: str, flags: int) -> int:
    """Open a file, but not what a symlink names, which is somebody's."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _files(path: Path) -> Files:
    """Return size and time of every file; an empty folder, which nobody would miss, has none."""
    found = {}
    for folder, names, files in os.walk(path) if path.is_dir() else [(str(path.parent), [], [path.name])]:
        links = [name for name in names if os.path.islink(os.path.join(folder, name))]
        for name in (*files, *links):
            state = os.lstat(os.path.join(folder, name))
            found[os.path.relpath(os.path.join(folder, name), path)] = [state.st_size, state.st_mtime_ns]
    return found


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f".{what}_{path.name}_{secrets.token_hex(4)}")


def remove(path: Path) -> None:
    """Remove a file or folder, or as much of a folder as can be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
