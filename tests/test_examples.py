"""Every example runs as a user would run it: as a process, from another folder, without arguments."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mssr.versions import SUPPORTED

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
NOT_INSTALLED_HERE = ("verl", "openrlhf")  # they pin versions that conflict with ours


@pytest.mark.slow("5 to 10 s each, most of it imports; test_readme and tests/integrations call what they call")
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_runs(example, tmp_path):
    ended = subprocess.run(
        [sys.executable, example], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    package = example.stem.split("_")[0]
    if package in NOT_INSTALLED_HERE and ended.returncode == 2:
        low, high = SUPPORTED[package]
        assert f"{package}>={low},<{high}: it is not installed" in ended.stderr
        return
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.strip()
