"""`bench.compare` finds a slowdown in noisy times, and does not report noise as one."""

import copy
import json
import statistics

import numpy as np
import pytest

from bench import compare
from mssr.cli import run_command

SPEEDS = {"eager": 0.4, "mssr exact": 0.36, "mssr sparse": 0.15, "torch linear CE": 0.35}
MACHINE = {"device": "a CPU, 2 threads", "torch": "2.13.0"}
SHAPE = {"model": None, "n": 512, "d": 512, "v": 32768, "dtype": "float32", "rows": "realistic"}


def report(seed: int, *, slower=None, turns=20, tasks=("loss", "forward"), noise=0.05, load=1.0) -> dict:
    """Return a report as from a shared machine: turns vary by 10 %, times by 5 % more, and one in twenty is an outlier."""
    random, cases = np.random.default_rng(seed), []
    for task in tasks:
        turn = load * np.exp(random.normal(0, 0.1, turns))
        providers = {}
        for name, seconds in SPEEDS.items():
            own = np.exp(random.normal(0, noise, turns))
            own = np.where(random.random(turns) < 0.05, own * random.uniform(1.3, 2.0, turns), own)
            all_ = (seconds * (slower or {}).get(name, 1.0) * turn * own).tolist()
            providers[name] = {
                "work": "policy loss with entropy",
                "seconds": statistics.median(all_),
                "seconds_all": all_,
                "peak_extra_mib": 300.0,
                "errors": {"logp": 2e-6, "d_weight": 3e-6},
            }
        for found in providers.values():
            pairs = zip(found["seconds_all"], providers["eager"]["seconds_all"])
            found["time_ratio"] = statistics.median(a / b for a, b in pairs)
        cases.append(SHAPE | {"task": task, "providers": providers})
    return {"machine": MACHINE, "settings": {"seed": 0, "repeats": turns}, "cases": cases}


def changed(before: dict, path: str, value) -> dict:
    """Return a changed copy. path: keys of the value in the first case."""
    after = copy.deepcopy(before)
    inner, keys = after["cases"][0]["providers"], path.split("/")
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    return after


def test_two_runs_of_the_same_code_are_not_flagged():
    for seed in range(40):
        assert compare.compare(report(seed), report(1000 + seed)).flagged == []


def test_a_machine_that_is_slower_as_a_whole_is_no_regression():
    for seed in range(10):
        found = compare.compare(report(seed), report(1000 + seed, load=1.5))
        assert found.flagged == []
        assert all(float(row[4].rstrip("%")) > 20 for _, rows in found.cases for row in rows)


def test_a_planted_slowdown_of_ours_is_flagged():
    """A single case may be missed, but not all cases of a report."""
    cases = 0
    for seed in range(40):
        flagged = compare.compare(report(seed), report(1000 + seed, slower={"mssr exact": 1.2})).flagged
        assert flagged and all(": mssr exact: " in line and "slower" in line for line in flagged)
        cases += len(flagged)
    assert cases >= 0.95 * 80


def test_a_slower_peer_is_shown_and_not_flagged():
    found = compare.compare(report(1), report(2, slower={"torch linear CE": 1.4}))
    verdicts = {row[0]: row[-1] for _, rows in found.cases for row in rows}
    assert found.flagged == [] and verdicts == dict.fromkeys(SPEEDS, "") | {"torch linear CE": "slower"}


def test_what_got_faster_is_shown():
    found = compare.compare(report(1), report(2, slower={"mssr sparse": 0.7}))
    assert found.flagged == [] and [row[-1] for row in found.cases[0][1]] == ["", "", "faster", ""]


def test_a_change_within_the_noise_is_not_flagged():
    """The medians differ by more than 10 %, which happens with times as noisy as these."""
    found = compare.compare(report(5, noise=0.5), report(15, noise=0.5))
    (row,) = (row for row in found.cases[0][1] if row[0] == "mssr exact")
    assert float(row[3].rstrip("%")) > 10 and row[-1] == "" and found.flagged == []


def test_too_few_turns_are_noted():
    found = compare.compare(report(1, turns=3), report(2, turns=3, slower={"mssr exact": 3.0}))
    assert found.flagged == [] and any("3 and 3 turns are too few" in line for line in found.notes)
    found = compare.compare(report(1, turns=5), report(2, turns=5, slower={"mssr exact": 3.0}))
    assert len(found.flagged) == 2 and not any("too few" in line for line in found.notes)


@pytest.mark.parametrize(
    ("path", "value", "flag"),
    [
        ("mssr exact/peak_extra_mib", 331.0, "MiB 300 -> 331"),
        ("mssr exact/peak_extra_mib", 329.0, None),  # 10 % are 30 MiB
        ("torch linear CE/peak_extra_mib", 900.0, None),
        ("mssr sparse/errors", {"logp": 3e-5, "d_weight": 3e-6}, "error of logp 2.0e-06 -> 3.0e-05"),
        ("mssr sparse/errors", {"logp": 9e-6, "d_weight": 9e-6}, None),  # rounding
        ("mssr sparse/errors", {"logp": 2e-6, "d_weight": float("nan")}, "error of d_weight 3.0e-06 -> nan"),
        ("torch linear CE/errors", {"logp": 1.0, "d_weight": 1.0}, None),
        ("torch linear CE", {"work": "", "skipped": "not installed: pip install it"}, None),
        ("mssr exact", {"work": "", "error": "RuntimeError: no"}, "measured -> failed: RuntimeError: no"),
    ],
)
def test_memory_errors_and_failures(path, value, flag):
    before = report(1)
    flagged = compare.compare(before, changed(before, path, value)).flagged
    assert [line.split(": ", 2)[2] for line in flagged] == ([flag] if flag else [])


def test_memory_of_small_cases_may_grow_by_16_mib():
    before = changed(report(1), "mssr exact/peak_extra_mib", 20.0)
    assert compare.compare(before, changed(before, "mssr exact/peak_extra_mib", 35.0)).flagged == []
    assert len(compare.compare(before, changed(before, "mssr exact/peak_extra_mib", 37.0)).flagged) == 1


def test_errors_of_16_bits_have_coarser_rounding():
    before = report(1)
    for case in before["cases"]:
        case["dtype"] = "bfloat16"
    rounding, wrong = ({"logp": 2e-6, "d_weight": error} for error in (3.5e-3, 5e-3))
    assert compare.compare(before, changed(before, "mssr exact/errors", rounding)).flagged == []
    assert len(compare.compare(before, changed(before, "mssr exact/errors", wrong)).flagged) == 1


def test_what_only_one_report_has_is_noted():
    before, after = report(1, tasks=("loss", "forward")), report(2, tasks=("loss", "frozen"))
    after["machine"] = MACHINE | {"torch": "2.14.0"}
    after["settings"] = {"seed": 0, "repeats": 30}
    after["cases"][0]["providers"]["quack CE"] = {"work": "", "error": "ModuleNotFoundError: quack"}
    del after["cases"][0]["providers"]["mssr sparse"]
    del before["cases"][0]["providers"]["eager"]["errors"]["logp"]
    del after["cases"][0]["providers"]["mssr exact"]["errors"]["logp"]
    del after["cases"][0]["providers"]["mssr exact"]["peak_extra_mib"]
    found = compare.compare(before, after)
    notes = "\n".join(found.notes)
    for expected in (
        "mssr exact: MiB, error of logp measured only in A",
        "torch 2.13.0 -> 2.14.0",
        "repeats 20 -> 30",
        "only in A: forward alone, N 512",
        "only in B: forward and backward, frozen head, N 512",
        "mssr sparse: measured -> not in the report",
        "quack CE: not in the report -> failed: ModuleNotFoundError: quack",
    ):
        assert expected in notes
    assert len(found.cases) == 1 and [row[0] for row in found.cases[0][1]] == [
        "eager",
        "mssr exact",
        "torch linear CE",
    ]


def test_without_eager_seconds_are_compared():
    """Eager does not fit at the longest inputs."""
    before, after = report(1), report(2, slower={"mssr exact": 1.3})
    for each in (before, after):
        each["cases"][0]["providers"]["eager"] = {"work": "", "error": "OutOfMemoryError"}
        for found in each["cases"][0]["providers"].values():
            found.pop("time_ratio", None)
    found = compare.compare(before, after)
    assert sum(": mssr exact: " in line for line in found.flagged) == 2
    assert any("without eager in both" in line for line in found.notes)


def test_exit_codes_and_what_is_printed(tmp_path, capsys):
    a, b = tmp_path / "a", tmp_path / "b"
    for folder, content in ((a, report(1)), (b, report(2, slower={"mssr exact": 1.2}))):
        folder.mkdir()
        (folder / "kernels.json").write_text(json.dumps(content))
    assert compare.main([str(a), str(a / "kernels.json")]) == 0
    assert "no regression of ours" in capsys.readouterr().out
    assert compare.main([str(a), str(b)]) == 1
    printed = capsys.readouterr().out
    assert printed.count("REGRESSION") == 2 and "slower relative to eager" in printed and "torch linear CE" in printed


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read as JSON"),
        ('{"shape": {}, "providers": {}}', "run the benchmark again"),
        (json.dumps(report(1, tasks=("frozen",))), "no case in common"),
    ],
)
def test_a_mistake_is_one_line_and_exits_with_2(content, says, tmp_path, capsys):
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(report(1)))
    if content is not None:
        bad.write_text(content)
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: compare.main([str(good), str(bad)]))
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_turns_that_do_not_belong_together_are_refused():
    after = report(2)
    after["cases"][0]["providers"]["mssr exact"]["seconds_all"].pop()
    with pytest.raises(ValueError, match="argument 2 is longer"):
        compare.compare(report(1), after)
