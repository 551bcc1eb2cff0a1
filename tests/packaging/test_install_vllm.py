"""What the installer takes of vLLM's requirements."""

import pytest

from mssr.install_vllm import requirements

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
