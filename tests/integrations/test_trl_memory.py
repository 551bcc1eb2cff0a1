"""Peak memory of TRL's loss with TRL's head and with ours, each in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow("27 s: needs a vocabulary so large that the logits dominate memory")
def test_peak_memory_of_the_loss_is_at_most_three_tenths_of_trls():
    """V 65536, 2048 scored tokens, and no prompt, because TRL on a CPU scores prompts too."""
    command = [sys.executable, Path(__file__).with_name("trl_memory.py"), "--d", "64"]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=500).stdout
    found = json.loads(said.splitlines()[-1])
    stock = found["trl"]
    for head in ("mssr", "mssr loss"):
        assert found[head]["peak_extra_mib"] <= 0.3 * stock["peak_extra_mib"], found
        assert found[head]["gradient_norm"] == pytest.approx(stock["gradient_norm"], rel=1e-4)
