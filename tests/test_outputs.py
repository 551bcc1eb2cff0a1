"""A run replaces what it wrote itself, and nothing else."""

import os

import pytest

from mssr.errors import UserError
from mssr.outputs import clear_leftovers, refuse_foreign, replace, set_aside, write_new


def folder_with(**files):
    def write(path):
        path.mkdir()
        for name, text in files.items():
            (path / name).write_text(text)

    return write


def contents(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("[!.]*") if path.is_file()}


def test_an_own_output_is_replaced_whole(tmp_path):
    replace(tmp_path, "model", folder_with(weights="first", other="only in the first"))
    replace(tmp_path, "config.yaml", lambda path: path.write_text("a: 1"))
    replace(tmp_path, "deep/step_1", folder_with(a="1"))
    assert replace(tmp_path, "model", folder_with(weights="second")) == tmp_path / "model"
    replace(tmp_path, "config.yaml", lambda path: path.write_text("a: 2"))
    assert contents(tmp_path) == {"model/weights": "second", "config.yaml": "a: 2", "deep/step_1/a": "1"}
    assert [path.name for path in tmp_path.glob(".*")] == [".mssr_outputs.jsonl"]


def someone_adds(folder):
    (folder / "notes.txt").write_text("mine")


def someone_edits(folder):
    (folder / "weights").write_text("other")  # of the same size
    os.utime(folder / "weights", (1, 1))  # else, in the same tick of the kernel's clock


def someone_links(folder):
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to(folder.with_name("elsewhere"))


def someone_has_another(folder):
    folder.rename(folder.with_name("first"))
    folder_with(weights="first")(folder)
    os.utime(folder / "weights", (1, 1))


@pytest.mark.parametrize("change", [someone_adds, someone_edits, someone_links, someone_has_another])
def test_what_somebody_changed_is_refused_and_kept(tmp_path, change):
    model = replace(tmp_path, "model", folder_with(weights="first"))
    change(model)
    before = contents(tmp_path)
    for attempt in (
        lambda: refuse_foreign(tmp_path, ["model"]),
        lambda: replace(tmp_path, "model", folder_with(weights="new")),
    ):
        with pytest.raises(UserError, match=f"^{model}: .*set another run_dir"):
            attempt()
        assert contents(tmp_path) == before


def test_an_empty_folder_is_no_loss_but_a_dangling_link_is_refused(tmp_path):
    (tmp_path / "model").mkdir()
    replace(tmp_path, "model", folder_with(weights="first"))
    (tmp_path / "adapter").symlink_to("nowhere")
    with pytest.raises(UserError, match="a symlink"):
        refuse_foreign(tmp_path, ["adapter"])


class Killed(BaseException):
    """Ends the process in a test as kill -9 would, except that `finally` runs."""


@pytest.mark.parametrize("nth", [1, 2])
def test_after_a_kill_between_the_renames_the_earlier_output_is_back(tmp_path, monkeypatch, nth):
    replace(tmp_path, "model", folder_with(weights="first"))
    rename, calls = os.rename, []

    def killed(source, target):
        calls.append(target)
        if len(calls) >= nth:
            raise Killed
        rename(source, target)

    monkeypatch.setattr("os.rename", killed)
    monkeypatch.setattr("mssr.outputs.remove", lambda path: None)
    with pytest.raises(Killed):
        replace(tmp_path, "model", folder_with(weights="second"))
    monkeypatch.undo()
    with (tmp_path / ".mssr_outputs.jsonl").open("a") as record:
        record.write('[1]\n7\n{"path": 1}\n{"path": "mod')  # no lines of ours, and one that the kill tore
    (tmp_path / ".partial_model").mkdir()  # a person's
    clear_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} - {"model"} == {".mssr_outputs.jsonl", ".partial_model"}
    assert contents(tmp_path) == {"model/weights": "first"}
    replace(tmp_path, "model", folder_with(weights="third"))
    replace(tmp_path, "model", folder_with(weights="fourth"))
    assert contents(tmp_path) == {"model/weights": "fourth"}


def test_a_rename_that_fails_leaves_the_earlier_output(tmp_path, monkeypatch):
    replace(tmp_path, "model", folder_with(weights="first"))
    rename = os.rename

    def fails(source, target):
        if ".partial_" in str(source):
            raise OSError
        rename(source, target)

    monkeypatch.setattr("os.rename", fails)
    with pytest.raises(OSError):
        replace(tmp_path, "model", folder_with(weights="second"))
    assert contents(tmp_path) == {"model/weights": "first"}


def test_a_new_folder_is_written_whole_where_nothing_is(tmp_path):
    def fail(path):
        folder_with(a="1")(path)
        raise OSError

    with pytest.raises(OSError):
        write_new(tmp_path / "new", fail)
    assert not list(tmp_path.iterdir())
    write_new(tmp_path / "new", folder_with(a="1"))
    with pytest.raises(UserError, match="already there"):
        write_new(tmp_path / "new", folder_with(a="2"))
    assert contents(tmp_path) == {"new/a": "1"} and len(list(tmp_path.iterdir())) == 1


def test_set_aside_takes_the_first_free_name(tmp_path):
    assert set_aside(tmp_path / "a") is None
    for text in ("first", "second"):
        (tmp_path / "a").write_text(text)
        set_aside(tmp_path / "a")
    assert contents(tmp_path) == {"a.1": "first", "a.2": "second"}
