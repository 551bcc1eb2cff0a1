"""`mssr doctor`: what this machine has, what the trainer will use on it, and how to fix what is missing.

Reads package metadata instead of importing packages; the few questions that only an import answers run in another process.
"""

import importlib.metadata
import importlib.util
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from mssr.config.resolve import dtype_name, engine_name, why_no_vllm
from mssr.guard import Guarded
from mssr.versions import TESTED, extra_of, is_supported, requirement, vllm_version

INSTALL_VLLM = "python -m mssr.rollout.vllm.install"  # chooses the build, and adds what the CPU build needs


@dataclass(frozen=True)
class Use:
    """What the trainer needs a package for."""

    purpose: str
    needed: bool = True


PACKAGES = {
    "torch": Use("everything"),
    "triton": Use("GPU kernels"),
    "transformers": Use("models"),
    "deepspeed": Use("training engine"),
    "datasets": Use("data from the hub"),
    "math-verify": Use("answer checking"),
    "peft": Use("LoRA", needed=False),
    "pydantic": Use("configuration"),
    "typer": Use("command line"),
    "rich": Use("display"),
    "tensorboard": Use("metrics"),
    "matplotlib": Use("curves"),
    "vllm": Use("fast rollouts", needed=False),
    "flash-attn": Use("attention", needed=False),
    "liger-kernel": Use("norms, SwiGLU; benchmarks", needed=False),
    "wandb": Use("tracker", needed=False),
    "mlflow-skinny": Use("tracker", needed=False),
    "trackio": Use("tracker", needed=False),
    "swanlab": Use("tracker", needed=False),
}

# The registry's builds of these are for CUDA: beside a CPU torch they fail on import, and transformers with them.
BREAKABLE = ("torchvision", "torchaudio")
PATIENCE = 120  # seconds for the answer of another process
ASK_TORCH = "import torch; print(torch.version.cuda, torch.cuda.is_available())"
LIST_GPUS = (
    "import torch; gpus = map(torch.cuda.get_device_properties, range(torch.cuda.device_count())); print('; '.join(['gpus', "
    "*(f'{gpu.name}, {gpu.total_memory >> 20} MiB, capability {gpu.major}.{gpu.minor}' for gpu in gpus)]))"
)
NVIDIA_DRIVER = Path("/dev/nvidiactl")
ASK_FLASH = "from flash_attn import flash_attn_varlen_func"  # as the trainer asks; a build need not have metadata


@dataclass(frozen=True)
class Finding:
    """Something to fix. blocks: training (or the GPU) cannot be used until it is fixed."""

    problem: str
    fix: str
    blocks: bool = True


@dataclass(frozen=True)
class Report:
    """facts: about the machine and what the trainer will use on it. versions: of the installed packages."""

    facts: dict[str, str]
    versions: dict[str, str]
    findings: tuple[Finding, ...]

    @property
    def exit_code(self) -> int:
        """0: everything needed is here. 1: something is missing."""
        return int(any(finding.blocks for finding in self.findings))


@dataclass(frozen=True)
class Probe:
    """How a line of Python ended in a process of its own: its output, or the last line of its error."""

    ok: bool
    text: str


def diagnose(gpus: Sequence[str] | None = None, probe: Callable[[str], Probe] | None = None) -> Report:
    """Examine this machine. The arguments replace what it finds: its GPUs (`_gpus`), and how a line of Python ends."""
    probe = probe or _probe
    gpus = (_gpus() or _torch_gpus(probe)) if gpus is None else gpus
    versions = _installed()
    device = "cuda" if gpus else "cpu"
    broken = _import_findings(versions, gpus, probe)
    findings = [*_missing(versions), *_unsupported(versions), *broken]
    flash = _flash(versions, probe) if gpus and "torch" in versions and not broken else None
    if flash and not flash.ok:
        problem = f"flash-attn cannot be imported: {flash.text}; attention will be SDPA"
        findings.append(Finding(problem, f"pip uninstall -y flash-attn && {_installs('flash-attn')}", blocks=False))
    if "vllm" in versions and (why := why_no_vllm(device)):
        findings.append(Finding(f"{why.partition(';')[0]}; rollouts will be slower", INSTALL_VLLM, blocks=False))
    choices = _choices(device, flash=flash is not None and flash.ok)
    return Report(_machine(gpus) | choices, versions, tuple(findings))


def print_report(report: Report, console: Console | None = None) -> int:
    """Show the report; return the exit code."""
    console = console or Console(highlight=False)

    def line(*parts: str | tuple[str, str]) -> None:
        console.print(Text.assemble(*parts), soft_wrap=True)

    for name, value in report.facts.items():
        line((f"{name:<16}", "dim"), value)
    line((f"\n{'package':<14}{'installed':<18}{'supported':<18}", "dim"))
    for name, use in PACKAGES.items():
        version = report.versions.get(name)
        state, colour = ("ok", "green") if version and is_supported(name, version) else ("unsupported", "yellow")
        if version is None:
            state, colour = ("missing", "red") if use.needed else ("optional", "dim")
        supported = requirement(name).removeprefix(name)
        about = (use.purpose, "dim") if version else _installs(name)
        line(f"{name:<14}{version or '-':<18}{supported:<18}", (f"{state:<13}", colour), about)
    for finding in report.findings:
        line(("✗ ", "bold red") if finding.blocks else ("! ", "bold yellow"), finding.problem)
        line((f"  {finding.fix}", "bold"))
    if report.exit_code == 0:
        line(("✓ everything the trainer needs is here", "green"))
    return report.exit_code


def _flash(versions: dict[str, str], probe: Callable[[str], Probe]) -> Probe | None:
    """How importing flash-attn ends; None if it is not there."""
    there = "flash-attn" in versions or importlib.util.find_spec("flash_attn") is not None
    return probe(ASK_FLASH) if there else None


def _choices(device: str, *, flash: bool) -> dict[str, str]:
    """What the trainer will use here where the configuration says auto. flash: flash-attn can be imported."""
    return {
        "model.dtype": dtype_name("auto", device),
        "rollout engine": engine_name("auto", device),
        "loss kernels": "triton for 16-bit heads, else chunked" if device == "cuda" else "chunked (mssr_kernels)",
        "attention": "flash-attn in 16 bits, else SDPA" if flash else "SDPA over packed sequences",
    }


def _installs(package: str) -> str:
    """Return the command that installs a package, in the checkout."""
    if package == "vllm":
        return INSTALL_VLLM
    extra = extra_of(package)
    return f"pip install -e '.[{extra}]'" if extra else "pip install -e ."


def _missing(versions: dict[str, str]) -> list[Finding]:
    """One finding per command: an extra that was never installed is one line, not ten."""
    missing: dict[str, list[str]] = {}
    for name, use in PACKAGES.items():
        if use.needed and name not in versions:
            missing.setdefault(_installs(name), []).append(name)
    return [Finding(f"missing: {', '.join(names)}", command) for command, names in missing.items()]


def _unsupported(versions: dict[str, str]) -> list[Finding]:
    """Packages of other versions; `why_no_vllm` judges vLLM's."""
    return [
        Finding(f"{name} {versions[name]} is not supported", f"pip install '{requirement(name)}'", blocks=False)
        for name in PACKAGES
        if name in versions and name != "vllm" and not is_supported(name, versions[name])
    ]


def _import_findings(versions: dict[str, str], gpus: Sequence[str], probe: Callable[[str], Probe]) -> list[Finding]:
    """Problems that only an import shows."""
    findings = []
    breakable = [name for name in BREAKABLE if name in versions and "torch" in versions]
    if breakable and not (answer := probe(f"import {', '.join(breakable)}")).ok:
        names = ", ".join(f"{name} {versions[name]}" for name in breakable)
        # vLLM needs torchvision; its installer installs a build that can be imported.
        fix = INSTALL_VLLM if "vllm" in versions else f"pip uninstall {' '.join(BREAKABLE)}"
        findings.append(Finding(f"{names} cannot be imported beside torch {versions['torch']}: {answer.text}", fix))
    if gpus and "torch" in versions:
        findings += _cuda_findings(probe(ASK_TORCH), versions["torch"], gpus[0])
    return findings


def _cuda_findings(answer: Probe, version: str, gpu: str) -> list[Finding]:
    """answer: to ASK_TORCH. version: torch's."""
    # Uninstalled first, since pip takes 2.13.0+cpu for an installed 2.13.0.
    reinstall = f"pip uninstall -y torch && pip install torch=={TESTED['torch']}"
    if not answer.ok:
        return [Finding(f"torch {version} cannot be imported: {answer.text}", reinstall)]
    cuda, available = answer.text.split()
    if cuda == "None":
        return [Finding(f"{gpu.partition(',')[0]} is here, but torch {version} is built for the CPU only", reinstall)]
    if available == "False":
        problem = f"torch {version} (CUDA {cuda}) cannot use {gpu}"
        return [Finding(problem, "update the driver, take a torch for an older CUDA, or unset CUDA_VISIBLE_DEVICES")]
    return []


def _probe(code: str) -> Probe:
    command, pipe = [sys.executable, "-c", code], subprocess.PIPE
    with Guarded(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True) as asked:
        try:
            out, err = asked.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(asked.pid, signal.SIGKILL)
            return Probe(False, f"no answer for {PATIENCE} s")
    lines = (err if asked.returncode else out).strip().splitlines()
    return Probe(asked.returncode == 0, lines[-1] if lines else f"exit status {asked.returncode}")


def _installed() -> dict[str, str]:
    versions = {}
    for name in (*PACKAGES, *BREAKABLE):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    vllm = vllm_version()  # its CPU build has another name
    return versions | ({"vllm": vllm} if vllm else {})


def _gpus() -> list[str]:
    """Name, memory, compute capability and driver of each GPU that the NVIDIA driver lists."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=PATIENCE, check=True)
    except (OSError, subprocess.SubprocessError):  # no driver
        return []
    return ["{}, {}, capability {}, driver {}".format(*line.split(", ")) for line in done.stdout.splitlines()]


def _torch_gpus(probe: Callable[[str], Probe]) -> list[str]:
    """The GPUs that torch sees where a container has the driver but no nvidia-smi."""
    answer = probe(LIST_GPUS) if NVIDIA_DRIVER.exists() else Probe(False, "")
    return answer.text.split("; ")[1:] if answer.ok else []


def _machine(gpus: Sequence[str]) -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = {
        "Python": f"{platform.python_version()} ({sys.prefix})",
        "system": platform.platform(),
        "CPU": f"{cores} cores, {_memory_bytes() / 2**30:.1f} GiB memory",
    }
    listed = {f"GPU {index}": gpu for index, gpu in enumerate(gpus)}
    return facts | (listed or {"GPU": "none with an NVIDIA driver: training runs on the CPU"})


def _memory_bytes() -> int:
    """Memory that this process may use: a container's limit counts, since the kernel kills a run that exceeds it."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return physical if text == "max" else min(physical, int(text))
