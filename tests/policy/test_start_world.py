"""Joining the process group: alone, from a launcher, and where it is impossible."""

import os
import socket
import subprocess
import sys

import pytest
import torch

from mssr.distributed import start_world
from mssr.errors import UserError

LAUNCHED = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
SCRIPT = """
import sys
import torch.distributed
from mssr.distributed import start_world
from mssr.errors import UserError
try:
    world = start_world("cpu")
except UserError as error:
    sys.exit(f"REFUSED {error}")
print(world.rank, world.size, world.device, start_world("cpu") == world)
torch.distributed.destroy_process_group()
"""


def start(**environment) -> subprocess.CompletedProcess:
    launcher = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR"}
    inherited = {name: value for name, value in os.environ.items() if name not in launcher}
    inherited["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    return subprocess.run(
        [sys.executable, "-c", SCRIPT], env=inherited | environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_asked_for_and_none_there():
    with pytest.raises(UserError, match=r"^device: cuda, but torch sees no GPU; .*device=cpu$"):
        start_world("cuda")


def test_without_a_launcher_a_group_of_one():
    assert start().stdout.strip().endswith("0 1 cpu True")


@pytest.mark.parametrize("launched", [{}, LAUNCHED])
def test_a_port_in_use(launched):
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = listener.getsockname()[1]
        refused = start(MASTER_PORT=str(port), **launched)
    assert refused.returncode == 1
    line = refused.stderr[refused.stderr.index("REFUSED") :].strip()
    assert f"port {port}" in line and "MASTER_PORT" in line and "\n" not in line
