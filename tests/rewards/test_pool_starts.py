"""What a worker is started with: the function, its options, the log of what it prints."""

import re
import threading

import pytest
from pools import BEHAVIOUR, function, kinds, open_pool, outcome, outcomes

from mssr.errors import UserError
from mssr.rewards import reward_log
from mssr.rewards.function import handed_over, named
from mssr.rewards.row import Row


def test_prints_are_cut(tmp_path):
    (tmp_path / "reward.log").touch()
    pool = open_pool(function("prints"), log=tmp_path / "reward.log", workers=2, timeout_s=60)
    assert kinds(outcomes(pool, *["go"] * 4)) == [None] * 4
    pool.close()
    text = (tmp_path / "reward.log").read_bytes()
    assert all(letter * 50 in text for letter in (b"p", b"e", b"c"))
    assert text.endswith(reward_log.FULL) and text.count(reward_log.FULL) == 1
    assert len(text) == reward_log.LIMIT + len(reward_log.FULL)


def test_prints_before_the_run_has_a_folder(tmp_path):
    file = tmp_path / "chatty.py"
    file.write_text("print('imported')\ndef f(response, row):\n    print('called')\n    return 1\n")
    pool = open_pool(named(f"{file}:f"), log=tmp_path / "run" / "reward.log")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "reward.log").touch()
    assert outcome(pool, "").parts
    pool.close()
    assert (tmp_path / "run" / "reward.log").read_text() == "imported\ncalled\n"


def test_nothing_is_written_into_a_folder_that_is_not_the_runs(tmp_path):
    file = tmp_path / "chatty.py"
    file.write_text("print('imported')\ndef f(response, row):\n    raise ValueError\n")
    (tmp_path / "run").mkdir()
    pool = open_pool(named(f"{file}:f"), log=tmp_path / "run" / "reward.log")
    assert outcome(pool, "").failure
    pool.close()
    assert not list((tmp_path / "run").iterdir())


def test_a_worker_that_starts_again_has_the_code_of_the_beginning(tmp_path):
    """And the time of an import is not that of a call."""
    file = tmp_path / "slow.py"
    source = (
        "import os, time\ntime.sleep(0.3)\ndef f(response, row):\n    return os._exit(3) if response == 'end' else {}\n"
    )
    file.write_text(source.format(1))
    pool = open_pool(named(f"{file}:f"), timeout_s=0.1)
    file.write_text(source.format(2))
    assert kinds(outcomes(pool, "end")) == ["died"]
    assert outcome(pool, "").parts == {"accuracy": 1}
    pool.close()


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("missing", {}, "no function missing there; the functions in it are sync, concurrent, .*, only_response"),
        ("NoFunction", {}, "no function NoFunction there; .*"),
        ("RETURNED", {}, "no function RETURNED there; .*"),
        (
            "sync",
            {"minus": 1},
            r"got an unexpected keyword argument 'minus'; it is called with \(response, row\) and its options \(minus\), "
            r"and its definition is sync\(response, row, plus=0.0\)",
        ),
        ("only_response", {}, r"too many positional arguments; .* only_response\(response\)"),
    ],
)
def test_a_function_that_does_not_fit(name, options, message):
    with pytest.raises(UserError) as raised:
        open_pool(function(name, options=options))
    assert re.fullmatch(rf"reward.function {re.escape(str(BEHAVIOUR))}:{name}: {message}", str(raised.value))


@pytest.mark.parametrize(
    "source, message",
    [
        ("import no_such_thing", r"importing it fails with ModuleNotFoundError: .* \({file}, line 1\)"),
        ("def f(:\n", r"importing it fails with SyntaxError: .* \({file}, line 1\)"),
        ("import sys; sys.exit(1)", r"importing it fails with SystemExit: 1 \({file}, line 1\)"),
        ("import os; os._exit(4)", r"its process ended 3 times while it was importing .*exit status 4.*"),
        ("", r"no function f there; there is no function in it"),
    ],
)
def test_a_file_that_cannot_be_imported(tmp_path, source, message):
    file = tmp_path / "mine.py"
    file.write_text(source)
    with pytest.raises(UserError) as raised:
        open_pool(named(f"{file}:f"))
    pattern = message.replace("{file}", re.escape(str(file)))
    assert re.fullmatch(f"reward.function {re.escape(str(file))}:f: {pattern}", str(raised.value))


@pytest.mark.parametrize(
    "where, message",
    [
        ("no/such.py:f", r"reward.function no/such.py:f: /.*/no/such.py: No such file or directory"),
        ("mine.py", "reward.function mine.py: name the function in the file too: mine.py:NAME"),
        (
            "__main__:score",
            r"reward.function __main__:score: a function of another Python process; give it again: train\(",
        ),
        ("notebook:f.<locals>.<lambda>", "reward.function notebook:f.<locals>.<lambda>: a function of another Python"),
        (
            "maths",
            "reward.function maths: no such built-in; one of .*, or path/to/file.py:NAME, or package.module:NAME",
        ),
    ],
)
def test_a_function_that_is_nowhere(where, message):
    with pytest.raises(UserError, match=message):
        named(where)


def test_a_function_of_a_package(tmp_path, monkeypatch):
    """Packages are found from the working folder; options arrive; its own time limit counts, and no other constant."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "rewards.py").write_text(
        "TIMEOUT_S = timeout_s = 0.001\ndef f(response, row, plus):\n    return 1 + plus\nf.timeout_s = 60\n"
    )
    monkeypatch.chdir(tmp_path)
    pool = open_pool(named("mine.rewards:f", label="short", options={"plus": 2}), timeout_s=0.001)
    assert outcome(pool, "").parts == {"short": 3.0}
    pool.close()
    with pytest.raises(UserError, match="mine.other:f: importing it fails with ModuleNotFoundError: No module named"):
        open_pool(named("mine.other:f"))


def test_images_are_sent_to_those_who_look(tmp_path):
    file = tmp_path / "blind.py"
    file.write_text("USES_IMAGES = False\ndef f(response, row):\n    return len(row.image_files)\n")
    pool = open_pool(named(f"{file}:f"))
    assert pool.submit("", Row("", "", image_files=(b"1", b"2"))).result(60).parts == {"accuracy": 0.0}
    pool.close()


def test_options_are_checked_by_the_function(tmp_path):
    file = tmp_path / "strict.py"
    file.write_text(
        "from mssr.errors import UserError\ndef f(response, row, **options):\n    return 1\n"
        "def check(**options):\n    raise UserError(f'n: must be positive, got {options}')\nf.check = check\n"
    )
    with pytest.raises(UserError, match=r"strict.py:f: n: must be positive, got {'n': 0}"):
        open_pool(named(f"{file}:f", options={"n": 0}))


def test_a_python_object():
    wanted = 7
    pool = open_pool(handed_over(lambda response, row: int(response) == wanted))
    assert [found.parts["accuracy"] for found in outcomes(pool, "7", "8")] == [1.0, 0.0]
    pool.close()


def test_python_objects_that_cannot_be_sent():
    lock = threading.Lock()
    with pytest.raises(UserError, match=r"cannot be sent to another process \(TypeError: cannot pickle .*lock"):
        handed_over(lambda response, row: lock)
    with pytest.raises(UserError, match="a float is no function"):
        handed_over(1.0)


def test_a_start_that_fails_later_ends_the_run(tmp_path):
    file = tmp_path / "once.py"
    file.write_text(
        f"import os\nif os.path.exists({str(tmp_path / 'gone')!r}):\n    os._exit(4)\n"
        "def f(response, row):\n    return os._exit(3) if response else 1\n"
    )
    pool = open_pool(named(f"{file}:f"))
    assert outcome(pool, "").parts
    (tmp_path / "gone").touch()
    assert kinds([outcome(pool, "end")]) == ["died"]
    for _ in range(2):
        with pytest.raises(UserError, match="its process ended 3 times while it was importing"):
            outcome(pool, "")
    pool.close()
