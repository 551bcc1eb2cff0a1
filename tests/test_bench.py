"""The benchmark's commands run and leave the figures they print."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SMALL = ["--n", "64", "--d", "32", "--v", "2048", "--device", "cpu"]


def bench(module, *arguments):
    run = subprocess.run(
        [sys.executable, "-m", f"bench.{module}", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


def test_kernels_beside_their_peers(tmp_path):
    names = ["mssr S", "torch linear CE"]
    bench(
        "kernels", *SMALL, "--rows", "realistic", "--repeats", 2, "--json", tmp_path / "out.json", "--providers", *names
    )
    report = json.loads((tmp_path / "out.json").read_text())
    assert set(report["providers"]) == {"eager", *names}
    assert report["providers"]["eager"]["time_ratio"] == report["providers"]["eager"]["memory_ratio"] == 1
    for name, result in report["providers"].items():
        assert result["seconds"] > 0 and result["peak_extra_mib"] >= 0
        if name.startswith("mssr"):
            assert all(value <= 5e-2 for value in result["gradient_difference"].values())
    assert report["machine"]["torch"] and report["shape"]["v"] == 2048


def test_tolerance(tmp_path):
    bench("tolerance", *SMALL, "--json", tmp_path / "out.json")
    report = json.loads((tmp_path / "out.json").read_text())
    for result in report["rows"].values():
        errors = result["errors"]
        assert max(errors["2^-14"]) <= 2 * max(errors["mode L"]) < max(errors["eager"])
        assert result["recommended"] <= -1
