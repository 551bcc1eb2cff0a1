"""How the benchmark reduces noise: freed memory stays, disturbed runs are repeated, all providers run in each turn."""

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

# Prints the page faults of a second block of 16 MiB, and the growth of the process in MiB after two blocks are freed.
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
def test_a_run_that_the_host_spoilt_is_repeated(stolen, kept, is_spoilt):
    clock = iter([second for each in stolen for second in (10.0, 10.0 + each)])
    seconds = iter([1.0, 2.0, 3.0])
    with patch.object(steal, "stolen_seconds", lambda: next(clock)):
        assert steal.least_disturbed(lambda: next(seconds)) == (kept, is_spoilt)
    assert next(clock, None) is None


def test_without_steal_time_no_run_is_spoilt():
    with patch.object(steal.psutil, "cpu_times", lambda: ()):  # as on a system that does not count it
        assert steal.least_disturbed(lambda: 1.0) == (1.0, False)


def test_every_turn_has_all_tasks():
    """Each provider is measured once per turn and task, on the inputs of the turn."""
    seen = []

    def rows(inputs, settings):
        seen.append((inputs.hidden.requires_grad, float(inputs.target.sum())))
        return PROVIDERS[EAGER].rows(inputs, settings)

    def loss(inputs, settings):
        seen.append((inputs.hidden.requires_grad, float(inputs.target.sum())))
        return PROVIDERS[EAGER].loss(inputs, settings)

    settings = Settings("cpu", repeats=3)
    sets = [cases.make(SHAPE, settings, seed) for seed in (0, 1)]
    names = [("loss", "spy"), ("loss", EAGER), ("forward", EAGER), ("forward", "spy")]
    results = {each: {"errors": {}} for each in names}
    spy = Provider(POLICY, loss, rows, Counts(1, 2, 3), Counts(0, 0, 0))
    with patch.dict(PROVIDERS, spy=spy), patch.object(steal, "stolen_seconds", lambda: 0.0):
        cases.measure_times(SHAPE, results, sets, settings, lambda name: None)
    targets = [float(tensors.target.sum()) for tensors in sets]
    turns = [targets[turn % 2] for turn in range(5)]  # two to warm up
    assert targets[0] != targets[1]
    assert seen == [(backward, target) for target in turns for backward in (True, False)]
    assert [len(found["seconds_all"]) for found in results.values()] == [3] * 4


def test_spoilt_times_are_reported():
    result = {"work": POLICY, "seconds": 1.0, "seconds_all": [1.0] * 5, "time_ratio": 1.0, "errors": {}, "spoilt": 2}
    case = SHAPE._asdict() | {"task": "loss", "providers": {EAGER: result, "cce": {"work": POLICY, "error": "no"}}}
    said = "2 of 5 times are of runs during which the host gave the processors to others"
    assert report.spoilt([case]) == said and said in tables.caveats([case])
    quiet = case | {"providers": case["providers"] | {EAGER: result | {"spoilt": 0}}}
    assert report.spoilt([quiet]) == ""
    same = {"machine": {}, "settings": {}}
    assert compare.compare(same | {"cases": [quiet]}, same | {"cases": [case]}).notes == [f"B: {said}"]
