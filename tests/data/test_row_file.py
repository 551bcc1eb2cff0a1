"""Rows are in one temporary file per machine, not in memory."""

import os
import random
import resource
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from mssr.data import row_file
from mssr.data.files import open_rows
from mssr.errors import UserError

IMAGE = 100_000


def write(file: Path, count: int, **options) -> Path:
    rows = [
        {"images": [{"bytes": random.Random(n).randbytes(IMAGE)}], "problem": f"{n}?", "answer": str(n)}
        for n in range(count)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, **options)
    return file


def resident() -> int:
    """Return the resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_parquet_file_does_not_stay_in_memory(tmp_path):
    open_rows(str(write(tmp_path / "small.parquet", 4)))  # loads what reading needs
    file = write(tmp_path / "a.parquet", 500, row_group_size=50)
    before = resident()
    rows = open_rows(str(file))
    assert [rows[n]["answer"] for n in range(500)] == [str(n) for n in range(500)]
    assert resident() - before < 500 * IMAGE / 2


def test_threads_read_their_own_rows(tmp_path):
    rows = open_rows(str(write(tmp_path / "a.parquet", 40)))
    order = [random.Random(0).randrange(40) for _ in range(2000)]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda n: rows[n], order))
    for n, row in zip(order, found, strict=True):
        assert row["answer"] == str(n) and row["images"][0]["bytes"] == random.Random(n).randbytes(IMAGE)
    assert rows[-1] == rows[39] and len(rows) == 40
    with pytest.raises(IndexError):
        rows[40]


def shared(world, path: str, folder: str, blind: bool):
    """Return the inode of the rows' file, the problems in it, the names of its columns, and what is in the folder."""
    tempfile.tempdir = folder
    share = row_file.RowFile.share
    if blind:
        row_file.RowFile.share = lambda place: share((place[0], bytes(16)))
    try:
        rows = open_rows(path, world)
        return os.stat(rows.place[0]).st_ino, [row["problem"] for row in rows], rows.names, os.listdir(folder)
    finally:
        tempfile.tempdir, row_file.RowFile.share = None, share


@pytest.mark.parametrize("blind", [False, True])
def test_ranks_of_a_machine_share_the_file(ranks, tmp_path, blind):
    file = write(tmp_path / "a.parquet", 10)
    (tmp_path / "temporary").mkdir()
    first, second = ranks(shared, str(file), str(tmp_path / "temporary"), blind)
    assert first[1:] == second[1:] == ([f"{n}?" for n in range(10)], ["images", "problem", "answer"], [])
    assert (first[0] == second[0]) is not blind


def test_a_file_of_another_process_that_has_no_rows_is_left_alone(tmp_path):
    """In another container the process id, and the number of the open file, may be anything."""
    reader, writer = os.pipe()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "short").write_bytes(b"1")
    names = [f"/proc/{os.getpid()}/fd/{reader}", tmp_path / "fifo", tmp_path / "short", tmp_path, tmp_path / "none"]
    try:
        assert [row_file.RowFile.share((str(name), bytes(16))) for name in names] == [None] * 5
    finally:
        os.close(reader)
        os.close(writer)


def opened(world, path: str) -> str:
    with pytest.raises(UserError) as caught:
        open_rows(path.replace("RANK", str(world.rank)), world)
    return str(caught.value)


def test_no_rank_waits_for_one_that_has_no_file(ranks, tmp_path):
    write(tmp_path / "0.parquet", 2)
    first, second = ranks(opened, str(tmp_path / "RANK.parquet"))
    assert first == second and first.startswith(f"{tmp_path}/1.parquet: no such file or directory; ")
    write(tmp_path / "1.parquet", 2).write_bytes(b"PAR1")
    first, second = ranks(opened, str(tmp_path / "RANK.parquet"))
    assert first == second and first.startswith(f"{tmp_path}/1.parquet: not a readable parquet file: ")


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    file = write(tmp_path / "a.parquet", 10)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", f"{tmp_path}/")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * IMAGE, limits[1]))
    try:
        with pytest.raises(UserError) as caught:
            open_rows(str(file))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(caught.value) == (
        f"{file}: cannot copy its rows to a temporary file in {tmp_path}: File too large; "
        "set the environment variable TMPDIR to a folder with room for a copy of the data"
    )
    assert os.listdir(tmp_path) == ["a.parquet"]


def test_a_temporary_folder_that_is_not_there_is_said(tmp_path, monkeypatch):
    file = write(tmp_path / "a.parquet", 1)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "scratch")])
    with pytest.raises(UserError) as caught:
        open_rows(str(file))
    assert str(caught.value).startswith(
        f"{file}: cannot copy its rows to a temporary file (TMPDIR {tmp_path / 'scratch'} cannot be used): No usable"
    )
