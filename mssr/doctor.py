"""`mssr doctor`: what this machine has, what the trainer will use, and what to install or mend.

Reads package metadata instead of importing packages; the few questions only an import answers run in another process.
"""

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mssr.versions import TESTED, is_cpu_build, is_supported, vllm_version

INSTALL_VLLM = "python -m mssr.rollout.vllm.install"  # picks the build, and what the CPU build needs besides


@dataclass(frozen=True)
class Requirement:
    """A package that the trainer uses or can use. extra: of setup.py, what installs it ("": the base installation)."""

    name: str
    purpose: str
    extra: str = "train"
    needed: bool = True

    @property
    def tested(self) -> str:
        return TESTED[self.name]

    @property
    def install(self) -> str:
        if self.extra == "vllm":
            return INSTALL_VLLM
        return f"pip install -e '.[{self.extra}]'" if self.extra else "pip install -e ."


REQUIREMENTS = (
    Requirement("torch", "everything", extra=""),
    Requirement("triton", "GPU kernels", extra=""),
    Requirement("transformers", "models"),
    Requirement("deepspeed", "training engine"),
    Requirement("datasets", "data from the hub"),
    Requirement("math-verify", "answer checking"),
    Requirement("peft", "LoRA", needed=False),
    Requirement("pydantic", "configuration"),
    Requirement("typer", "command line"),
    Requirement("rich", "display"),
    Requirement("tensorboard", "metrics"),
    Requirement("matplotlib", "curves"),
    Requirement("nvidia-ml-py", "GPU readings"),
    Requirement("vllm", "fast rollouts", extra="vllm", needed=False),
    Requirement("flash-attn", "attention", extra="flash", needed=False),
    Requirement("liger-kernel", "norms, SwiGLU; benchmarks", extra="liger", needed=False),
)

# The registry's builds of these are for CUDA: beside a CPU torch they fail on import, and transformers with them.
BREAKABLE = ("torchvision", "torchaudio")


@dataclass(frozen=True)
class Package:
    requirement: Requirement
    version: str | None

    @property
    def state(self) -> str:
        if self.version is None:
            return "missing"
        return "ok" if is_supported(self.requirement.name, self.version) else "untested"


@dataclass(frozen=True)
class Gpu:
    name: str
    memory_gib: float
    compute_capability: str
    driver: str


@dataclass(frozen=True)
class Finding:
    """Something to mend. blocks: training (or the GPU) cannot be used until it is."""

    problem: str
    fix: str
    blocks: bool = True


@dataclass(frozen=True)
class Report:
    """facts: about the machine and what the trainer will use on it, name -> value."""

    facts: dict[str, str]
    packages: tuple[Package, ...]
    findings: tuple[Finding, ...]

    @property
    def exit_code(self) -> int:
        """0: everything needed is here. 1: something is not."""
        return int(any(finding.blocks for finding in self.findings))


@dataclass(frozen=True)
class Probe:
    """How a line of Python ended in a process of its own: its output, or the last line of its error."""

    ok: bool
    text: str


def diagnose(
    installed: Mapping[str, str] | None = None,
    gpus: Sequence[Gpu] | None = None,
    probe: Callable[[str], Probe] | None = None,
) -> Report:
    """Looks at this machine. The arguments stand in for what it finds: versions, GPUs, how a line of Python ends."""
    installed = _installed() if installed is None else installed
    gpus = _gpus() if gpus is None else gpus
    packages = tuple(Package(requirement, installed.get(requirement.name)) for requirement in REQUIREMENTS)
    findings = [
        *_package_findings(packages),
        *_build_findings(installed, gpus),
        *_import_findings(installed, gpus, probe or _probe),
    ]
    return Report(_machine(gpus) | _choices(packages, gpus), packages, tuple(findings))


def print_report(report: Report, console: Console | None = None) -> int:
    """Shows the report and returns the exit code."""
    console = console or Console(highlight=False)
    facts = Table.grid(padding=(0, 2))
    for name, value in report.facts.items():
        facts.add_row(Text(name, "dim"), value)
    console.print(facts, "", _package_table(report.packages), sep="\n")
    for finding in report.findings:
        mark = Text("✗ ", "bold red") if finding.blocks else Text("! ", "bold yellow")
        console.print(mark + Text(finding.problem), soft_wrap=True)
        console.print(Text(f"  {finding.fix}", "bold"), soft_wrap=True)
    if report.exit_code == 0:
        console.print(Text("✓ everything the trainer needs is here", "green"))
    return report.exit_code


def _choices(packages: Sequence[Package], gpus: Sequence[Gpu]) -> dict[str, str]:
    """What the trainer will use here, by what it is for."""
    vllm = next(package for package in packages if package.requirement.name == "vllm")
    usable = vllm.state == "ok" and is_cpu_build(vllm.version) != bool(gpus)
    return {
        "rollout engine": "vllm, in the trainer's process" if usable else "hf (transformers generate)",
        "loss kernels": "triton for 16-bit heads, else chunked" if gpus else "chunked (mssr_kernels)",
        "attention": "SDPA over packed sequences",
    }


def _package_table(packages: Sequence[Package]) -> Table:
    marks = {"ok": ("ok", "green"), "untested": ("untested", "yellow"), "missing": ("missing", "red")}
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for heading in ("package", "installed", "tested", "", ""):
        table.add_column(heading, no_wrap=True)
    for package in packages:
        requirement = package.requirement
        missing = package.state == "missing"
        mark = ("optional", "dim") if missing and not requirement.needed else marks[package.state]
        about = Text(requirement.install) if missing else Text(requirement.purpose, "dim")
        table.add_row(requirement.name, package.version or "-", requirement.tested, Text(*mark), about)
    return table


def _package_findings(packages: Sequence[Package]) -> list[Finding]:
    missing: dict[str, list[str]] = {}  # by command: one line for an extra that was never installed, not fourteen
    for package in packages:
        if package.state == "missing" and package.requirement.needed:
            missing.setdefault(package.requirement.install, []).append(package.requirement.name)
    findings = [Finding(f"missing: {', '.join(names)}", command) for command, names in missing.items()]
    for package in packages:
        if package.state == "untested":
            name, tested = package.requirement.name, package.requirement.tested
            problem = f"{name} {package.version} was never tried with this trainer; {tested} was"
            findings.append(Finding(problem, f"pip install {name}=={tested}", blocks=False))
    return findings


def _build_findings(installed: Mapping[str, str], gpus: Sequence[Gpu]) -> list[Finding]:
    """vLLM for another device. Training works without it, with slower rollouts."""
    version = installed.get("vllm")
    if version is None or is_cpu_build(version) != bool(gpus):
        return []
    built, here = ("the CPU", gpus[0].name) if gpus else ("CUDA", "no GPU")
    return [Finding(f"vllm {version} is built for {built}, here is {here}", INSTALL_VLLM, blocks=False)]


def _import_findings(installed: Mapping[str, str], gpus: Sequence[Gpu], probe: Callable[[str], Probe]) -> list[Finding]:
    """What versions cannot tell. The probes run side by side: each imports torch, which takes seconds."""
    if "torch" not in installed:
        return []
    checks = {f"import {name}": _broken(name, installed) for name in BREAKABLE if name in installed}
    if gpus:
        checks["import torch; print(torch.version.cuda, torch.cuda.is_available())"] = _cuda_unusable(installed, gpus)
    with ThreadPoolExecutor(max_workers=3) as pool:
        results = pool.map(probe, checks)
        findings = [check(result) for check, result in zip(checks.values(), results, strict=True)]
    return [finding for finding in findings if finding is not None]


def _broken(name: str, installed: Mapping[str, str]) -> Callable[[Probe], Finding | None]:
    def check(result: Probe) -> Finding | None:
        if result.ok:
            return None
        problem = f"{name} {installed[name]} cannot be imported beside torch {installed['torch']}: {result.text}"
        # vLLM needs torchvision; its installer knows how to make it bearable.
        return Finding(problem, INSTALL_VLLM if "vllm" in installed else f"pip uninstall {' '.join(BREAKABLE)}")

    return check


def _cuda_unusable(installed: Mapping[str, str], gpus: Sequence[Gpu]) -> Callable[[Probe], Finding | None]:
    def check(result: Probe) -> Finding | None:
        version = installed["torch"]
        # Uninstalled first, since pip takes 2.13.0+cpu for an installed 2.13.0.
        reinstall = f"pip uninstall -y torch && pip install torch=={TESTED['torch']}"
        if not result.ok:
            return Finding(f"torch {version} cannot be imported: {result.text}", reinstall)
        cuda, available = result.text.split()
        if cuda == "None":
            return Finding(f"{gpus[0].name} is here, but torch {version} is built for the CPU only", reinstall)
        if available == "False":
            problem = f"torch {version} (CUDA {cuda}) cannot use {gpus[0].name} with driver {gpus[0].driver}"
            return Finding(problem, "update the driver, take a torch for an older CUDA, or unset CUDA_VISIBLE_DEVICES")
        return None

    return check


def _probe(code: str) -> Probe:
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return Probe(False, "no answer for 120 s")
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
    return Probe(done.returncode == 0, lines[-1] if lines else f"exit status {done.returncode}")


def _installed() -> dict[str, str]:
    versions = {}
    for name in (*TESTED, *BREAKABLE):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    if vllm := vllm_version():  # its CPU build has another name
        versions["vllm"] = vllm
    return versions


def _gpus() -> list[Gpu]:
    if importlib.util.find_spec("pynvml") is None:
        return []
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []  # no driver
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return [
            Gpu(
                name=pynvml.nvmlDeviceGetName(handle),
                memory_gib=pynvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30,
                compute_capability="{}.{}".format(*pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
                driver=pynvml.nvmlSystemGetDriverVersion(),
            )
            for handle in handles
        ]
    finally:
        pynvml.nvmlShutdown()


def _machine(gpus: Sequence[Gpu]) -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = {
        "Python": f"{platform.python_version()} ({sys.prefix})",
        "system": platform.platform(),
        "CPU": f"{cores} cores, {_memory_bytes() / 2**30:.1f} GiB memory",
    }
    for index, gpu in enumerate(gpus):
        about = f"{gpu.name}, {gpu.memory_gib:.0f} GiB, capability {gpu.compute_capability}, driver {gpu.driver}"
        facts[f"GPU {index}"] = about
    return facts if gpus else facts | {"GPU": "none with an NVIDIA driver: training runs on the CPU"}


def _memory_bytes() -> int:
    """What this process may use: a container's limit is what a training run is killed at."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return physical if text == "max" else min(physical, int(text))
