import importlib.metadata
import io
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from mssr import doctor
from mssr.doctor import PACKAGES, Probe, diagnose, print_report
from mssr.versions import SUPPORTED, TESTED, requirement

H200 = "NVIDIA H200, 143771 MiB, capability 9.0, driver 580.95"


def works(code):
    return Probe(True, "13.0 True")


@pytest.fixture
def check(monkeypatch):
    """Diagnose a machine that has everything, except for `changes`: package -> version (None: not installed)."""

    def check(changes=None, gpus=(), probe=works):
        installed = {name: SUPPORTED[name][0] for name in PACKAGES} | {
            "vllm": TESTED["vllm"] + ("" if gpus else "+cpu")
        }
        installed |= changes or {}

        def version(name):
            if installed.get(name) is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return installed[name]

        monkeypatch.setattr(importlib.metadata, "version", version)
        return diagnose(gpus=gpus, probe=probe)

    return check


def show(report):
    console = Console(file=io.StringIO(), width=80)
    code = print_report(report, console)
    return code, console.file.getvalue()


def test_a_machine_with_everything_has_no_findings(check):
    code, text = show(check(gpus=[H200]))
    assert code == 0
    assert check(gpus=[H200]).findings == ()
    assert "NVIDIA H200, 143771 MiB, capability 9.0, driver 580.95" in text
    assert "everything the trainer needs is here" in text
    for name in PACKAGES:
        supported = requirement(name).removeprefix(name)
        assert any(line.split()[::2][:2] == [name, supported] and line.split()[3] == "ok" for line in text.splitlines())


def test_the_report_says_what_will_be_used(check):
    _, text = show(check())
    lines = {line[:16].strip(): line[16:].strip() for line in text.splitlines()}
    assert lines["loss kernels"].startswith("chunked")
    assert lines["rollout engine"].startswith("vllm")
    assert lines["attention"].startswith("SDPA")
    assert lines["GPU"].startswith("none")
    assert lines["Python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert "GiB memory" in lines["CPU"]


def test_missing_packages_are_named_with_the_command_of_their_extra(check):
    report = check({"transformers": None, "deepspeed": None, "torch": None})
    assert [(finding.problem, finding.fix) for finding in report.findings] == [
        ("missing: torch", "pip install -e ."),
        ("missing: transformers, deepspeed", "pip install -e '.[train]'"),
    ]
    code, text = show(report)
    assert code == 1
    assert "pip install -e '.[train]'" in text and "everything" not in text.splitlines()[-1]


@pytest.mark.parametrize("vllm", [None, "0.25.1", "0.33.0"])
def test_without_a_vllm_it_knows_it_will_use_hf(check, vllm):
    _, text = show(check({"vllm": vllm}))
    assert any(line.split()[:3] == ["rollout", "engine", "hf"] for line in text.splitlines())


@pytest.mark.parametrize(
    "name, command", [("vllm", "python -m mssr.rollout.vllm.install"), ("flash-attn", "pip install -e '.[flash]'")]
)
def test_an_optional_package_is_only_offered(check, name, command):
    report = check({name: None})
    assert report.findings == ()
    code, text = show(report)
    row = next(line for line in text.splitlines() if line.startswith(name))
    assert code == 0 and "optional" in row and command in row


@pytest.mark.parametrize(
    "name, version, supported",
    [
        ("torch", "2.11.0", True),
        ("torch", "2.13.0+cpu", True),
        ("torch", "2.14.1", True),
        ("torch", "2.10.2", False),
        ("torch", "2.15.0", False),
        ("triton", "3.5.1", False),
        ("triton", "3.9.0", True),
        ("triton", "3.10", False),
        ("transformers", "5.16.0", False),
        ("transformers", "5.16.1", True),
        ("transformers", "5.20.0", False),
        ("vllm", "0.26.0+cpu", True),
        ("deepspeed", "0.19.7", False),
        ("deepspeed", "0.20.0", False),
        ("datasets", "5.9.0", True),
        ("datasets", "3.9.0", False),
    ],
)
def test_an_unsupported_version_is_a_warning(check, name, version, supported):
    report = check({name: version})
    assert report.exit_code == 0
    if supported:
        assert report.findings == ()
    else:
        (finding,) = report.findings
        assert version in finding.problem and finding.fix == f"pip install '{requirement(name)}'"
        assert "unsupported" in show(report)[1]


def test_flash_attn_is_used_where_the_trainer_can_import_it(check, tmp_path, monkeypatch):
    """A build may have no package metadata."""
    monkeypatch.syspath_prepend(tmp_path)
    without = {"flash-attn": None}
    assert check(without, gpus=[H200]).facts["attention"].startswith("SDPA")
    (tmp_path / "flash_attn.py").touch()
    report = check(without, gpus=[H200])
    assert report.facts["attention"] == "flash-attn in 16 bits, else SDPA" and report.findings == ()
    assert check(without).facts["attention"].startswith("SDPA")  # it needs a GPU


def test_a_flash_attn_that_cannot_be_imported_is_found_and_will_not_be_used(check):
    def probe(code):
        broken = "flash_attn" in code
        return Probe(not broken, "ImportError: undefined symbol: _ZN3c10" if broken else "13.0 True")

    report = check(gpus=[H200], probe=probe)
    (finding,) = report.findings
    assert "flash-attn cannot be imported: ImportError: undefined symbol" in finding.problem
    assert report.exit_code == 0 and report.facts["attention"].startswith("SDPA")


def test_a_gpu_beside_a_cpu_torch_is_found(check):
    report = check({"torch": "2.13.0+cpu"}, [H200], probe=lambda code: Probe(True, "None False"))
    (finding,) = report.findings
    assert "NVIDIA H200" in finding.problem and "CPU only" in finding.problem
    assert finding.fix == f"pip uninstall -y torch && pip install torch=={TESTED['torch']}"
    assert report.exit_code == 1


def test_a_gpu_that_torch_cannot_use_is_found(check):
    (finding,) = check(gpus=[H200], probe=lambda code: Probe(True, "13.0 False")).findings
    assert "CUDA 13.0" in finding.problem and "driver 580.95" in finding.problem


def test_a_torch_that_does_not_start_is_found(check):
    (finding,) = check(gpus=[H200], probe=lambda code: Probe(False, "OSError: libcudart.so.13")).findings
    assert "libcudart.so.13" in finding.problem


def test_without_a_gpu_a_cpu_torch_is_fine_and_nothing_is_imported(check):
    def never(code):
        raise AssertionError(code)

    assert check({"torch": "2.13.0+cpu"}, probe=never).findings == ()


@pytest.mark.parametrize(
    ("version", "gpus", "problem"),
    [
        ("0.32.0", [], "vLLM 0.32.0 is built for cuda, device is cpu; rollouts will be slower"),
        ("0.32.0+cpu", [H200], "vLLM 0.32.0+cpu is built for cpu, device is cuda; rollouts will be slower"),
        ("0.33.0+cpu", [], "vLLM 0.33.0+cpu is not supported (>=0.26, <0.33 is); rollouts will be slower"),
    ],
)
def test_a_vllm_that_cannot_be_used_is_found_and_will_not_be_used(check, version, gpus, problem):
    report = check({"vllm": version}, gpus=gpus)
    (finding,) = report.findings
    assert (finding.problem, finding.fix) == (problem, "python -m mssr.rollout.vllm.install")
    assert report.exit_code == 0
    assert report.facts["rollout engine"] == "hf"


@pytest.mark.parametrize(
    "vllm, fix", [(None, "pip uninstall torchvision torchaudio"), ("0.32.0+cpu", "python -m mssr.rollout.vllm.install")]
)
def test_a_torchvision_that_breaks_imports_is_found(check, vllm, fix):
    def probe(code):
        broken = "torchvision" in code
        return Probe(not broken, "RuntimeError: operator torchvision::nms does not exist" if broken else "")

    report = check({"torchvision": "0.28.0", "torchaudio": "2.11.0", "vllm": vllm}, probe=probe)
    (finding,) = report.findings
    assert "torchvision 0.28.0" in finding.problem and "nms does not exist" in finding.problem
    assert finding.fix == fix
    assert report.exit_code == 1


def test_the_driver_lists_the_gpus(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho NVIDIA H200, 143771 MiB, 9.0, 580.95\necho NVIDIA L4, 23034 MiB, 8.9, 580.95\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    facts = diagnose(probe=works).facts
    assert (facts["GPU 0"], facts["GPU 1"]) == (H200, "NVIDIA L4, 23034 MiB, capability 8.9, driver 580.95")
    tool.write_text("#!/bin/sh\necho No devices were found\nexit 6\n")
    assert "GPU" in diagnose(probe=works).facts
    tool.unlink()
    assert "GPU" in diagnose(probe=works).facts


def test_a_container_may_have_a_gpu_without_nvidia_smi(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor, "NVIDIA_DRIVER", tmp_path)
    l4 = "NVIDIA L4, 22478 MiB, capability 8.9"
    report = diagnose(probe=lambda code: Probe(True, f"gpus; {l4}" if "get_device_properties" in code else "13.0 True"))
    assert report.facts["GPU 0"] == l4 and report.facts["model.dtype"] == "bfloat16"


def test_torch_is_asked_for_the_gpus_that_it_sees():
    done = subprocess.run([sys.executable, "-c", doctor.LIST_GPUS], capture_output=True, text=True, check=True)
    assert (
        done.stdout.strip().split("; ")[0] == "gpus" and len(done.stdout.split("; ")) == 1 + torch.cuda.device_count()
    )


def test_a_package_that_really_fails_to_import_is_found(check, tmp_path, monkeypatch):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('built for CUDA')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (finding,) = check({"torchvision": "0.28.0"}, probe=None).findings
    assert finding.problem.endswith("RuntimeError: built for CUDA")


def test_this_machine_can_be_diagnosed_without_importing_what_is_heavy():
    code = (
        "import sys; from mssr.doctor import diagnose, print_report; code = print_report(diagnose())\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'vllm', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert code in (0, 1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert importlib.metadata.version("rich") in done.stdout
