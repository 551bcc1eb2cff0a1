"""What keeps the benchmark's times from being those of something else: memory that stays, runs made again, common turns."""

import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

from bench import cases, compare, report, steal, tables
from bench.jobs import POLICY, Counts, Provider, Settings
from bench.providers import PROVIDERS
from bench.report import EAGER
from bench.shapes import Shape

ROOT = Path(__file__).parents[1]
SHAPE = Shape(None, 16, 16, 512, "float32", "realistic")

# Prints the page faults of a second block of 16 MiB, and by how many MiB the process grew by two that are freed again.
BLOCKS = """
import ctypes, resource, sys
from bench import heap
from bench.memory import resident_bytes
getattr(heap, sys.argv[1])()
def block():
    place = libc.malloc(ctypes.c_size_t(16 << 20))
    ctypes.memset(place, 1, 16 << 20)
    libc.free(ctypes.c_void_p(place))
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
before = resident_bytes("VmRSS")
block()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
block()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults, (resident_bytes("VmRSS") - before) >> 20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
@pytest.mark.parametrize(("way", "stays"), [("keep", True), ("give_back", False)])
def test_freed_memory_stays_or_goes(way, stays):
    done = subprocess.run([sys.executable, "-c", BLOCKS, way], cwd=ROOT, capture_output=True, text=True, check=True)
    faults, grown = map(int, done.stdout.split())
    assert (faults < 100) == stays and (grown > 12) == stays


@pytest.mark.parametrize(
    ("stolen", "kept", "is_spoilt"),
    [
        ([0.0], 1.0, False),
        ([0.04], 1.0, False),  # of a second
        ([0.06, 0.0], 2.0, False),
        ([0.5, 0.3, 0.6], 2.0, True),  # of 1, 2 and 3 seconds: 50, 15 and 20 %
    ],
)
def test_a_run_that_the_host_spoilt_is_made_again(stolen, kept, is_spoilt):
    clock = iter([second for each in stolen for second in (10.0, 10.0 + each)])
    seconds = iter([1.0, 2.0, 3.0])
    with patch.object(steal, "stolen_seconds", lambda: next(clock)):
        assert steal.least_disturbed(lambda: next(seconds)) == (kept, is_spoilt)
    assert next(clock, None) is None


def test_stolen_time_is_the_eighth_of_the_first_line(tmp_path):
    stat = tmp_path / "stat"
    stat.write_text("cpu  3741972 1367916 712787 1816199 21423 0 7815 350 0 0\ncpu0 1 1 1 1 1 1 1 9 0 0\n")
    with patch.object(steal, "STAT", stat), patch.object(steal.os, "sysconf", lambda name: 100):
        assert steal.stolen_seconds() == 3.5
    with patch.object(steal, "STAT", tmp_path / "none"):
        assert steal.stolen_seconds() == 0


def test_every_turn_has_all_tasks():
    """And each is measured once in it, on the inputs of the turn."""
    seen = []

    def rows(inputs, settings):
        seen.append((inputs.hidden.requires_grad, float(inputs.target.sum())))
        return PROVIDERS[EAGER].rows(inputs, settings)

    def loss(inputs, settings):
        seen.append((inputs.hidden.requires_grad, float(inputs.target.sum())))
        return PROVIDERS[EAGER].loss(inputs, settings)

    settings = Settings("cpu", repeats=3)
    sets = [cases.make(SHAPE, settings, seed) for seed in (0, 1)]
    names = {"loss": ["spy", EAGER], "forward": [EAGER, "spy"]}
    spy = Provider(POLICY, loss, rows, Counts(1, 2, 3), Counts(0, 0, 0))
    with patch.dict(PROVIDERS, spy=spy), patch.object(steal, "stolen_seconds", lambda: 0.0):
        found = cases.timed(SHAPE, names, sets, settings, lambda name: None)
    targets = [float(tensors.target.sum()) for tensors in sets]
    turns = [targets[turn % 2] for turn in range(5)]  # two to warm up
    assert targets[0] != targets[1]
    assert seen == [(backward, target) for target in turns for backward in (True, False)]
    assert [len(found[task][name]["seconds_all"]) for task in names for name in names[task]] == [3] * 4


def test_spoilt_times_are_told():
    result = {"work": POLICY, "seconds": 1.0, "seconds_all": [1.0] * 5, "time_ratio": 1.0, "errors": {}, "spoilt": 2}
    case = SHAPE._asdict() | {"task": "loss", "providers": {EAGER: result, "cce": {"work": POLICY, "error": "no"}}}
    said = "2 of 5 times are of runs during which the host gave the processors to others"
    assert report.spoilt([case]) == said and said in tables.caveats([case])
    quiet = case | {"providers": case["providers"] | {EAGER: result | {"spoilt": 0}}}
    assert report.spoilt([quiet]) == ""
    same = {"machine": {}, "settings": {}}
    assert compare.compare(same | {"cases": [quiet]}, same | {"cases": [case]}).notes == [f"B: {said}"]
