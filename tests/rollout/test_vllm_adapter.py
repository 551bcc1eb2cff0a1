"""Which versions and builds of vLLM are used, and the errors for others."""

import sys

import pytest
from policy_helpers import ALONE, processors, run_config

import mssr.rollout as rollout
from mssr.config import resolve
from mssr.config.resolve import engine_name, why_no_vllm
from mssr.errors import UserError
from mssr.rollout.vllm.adapter import require_server_vllm, require_vllm
from mssr.rollout.vllm.engine import VLLMRollout
from mssr.versions import is_supported, vllm_version


@pytest.mark.parametrize("version", ["0.26.0", "0.27.1", "0.31.0", "0.32.0", "0.32.0+cpu", "0.32.1rc1"])
def test_supported_versions(version):
    assert is_supported("vllm", version)


@pytest.mark.parametrize("version", ["0.25.1", "0.33.0", "1.0.0", "0.9.2", "unknown"])
def test_other_versions_are_refused_in_one_line(version, monkeypatch):
    monkeypatch.setattr(resolve, "vllm_version", lambda: version)
    with pytest.raises(UserError) as caught:
        require_vllm("cuda")
    line = str(caught.value)
    assert line == (
        f"rollout.engine: vLLM {version} is not supported (>=0.26, <0.33 is); "
        "pip install vllm==0.32.0, or set rollout.engine=hf"
    )


def test_a_missing_vllm_is_told_with_the_way_to_install_it(monkeypatch):
    monkeypatch.setattr(resolve, "vllm_version", lambda: None)
    with pytest.raises(UserError, match="vLLM is not installed; run `python -m mssr.rollout.vllm.install`"):
        require_vllm("cpu")


@pytest.mark.parametrize(
    ("version", "device", "built"),
    [("0.32.0", "cpu", "cuda"), ("0.32.0+cpu", "cuda", "cpu"), ("0.32.1.dev3+g1f2e.cpu", "cuda", "cpu")],
)
def test_a_build_for_another_device_is_refused(version, device, built, monkeypatch):
    monkeypatch.setattr(resolve, "vllm_version", lambda: version)
    assert why_no_vllm(device) == (
        f"vLLM {version} is built for {built}, device is {device}; "
        "run `python -m mssr.rollout.vllm.install` for another build"
    )
    assert why_no_vllm("auto") is None and why_no_vllm(built) is None


def test_servers_need_a_gpu(monkeypatch):
    """The weight transfer for a CPU is a plugin of these tests: see `server_helpers`."""
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if not folder.endswith("gloo_plugin")])
    with pytest.raises(UserError, match=r"^rollout\.engine servers needs a GPU: .*; set rollout\.engine=vllm$"):
        require_server_vllm("cpu")


def test_this_environment_has_one():
    """The suite runs real vLLM: without it these tests fail, they are not skipped."""
    assert is_supported("vllm", vllm_version())
    require_vllm("cpu")


@pytest.mark.parametrize(
    "version, device, engine",
    [
        ("0.32.0", "cuda", "vllm"),
        ("0.32.0+cpu", "cpu", "vllm"),
        (None, "cpu", "hf"),
        ("0.33.0", "cuda", "hf"),
        ("0.32.0", "cpu", "hf"),
    ],
)
def test_auto_takes_vllm_where_it_can(version, device, engine, monkeypatch):
    monkeypatch.setattr(resolve, "vllm_version", lambda: version)
    assert engine_name("auto", device) == engine


@pytest.mark.parametrize("setting", ["vllm", "servers", "hf"])
def test_what_is_asked_for_is_not_replaced(setting, monkeypatch):
    monkeypatch.setattr(resolve, "vllm_version", lambda: None)
    assert engine_name(setting, "cpu") == setting


@pytest.mark.parametrize(
    "version, said",
    [
        (None, "vLLM is not installed"),
        ("0.33.0", "vLLM 0.33.0 is not supported"),
        ("0.32.0", "vLLM 0.32.0 is built for cuda, device is cpu"),
    ],
)
def test_where_auto_is_not_vllm_it_says_why_once(policy, version, said, monkeypatch, capsys):
    monkeypatch.setattr(resolve, "vllm_version", lambda: version)
    engine = rollout.make_rollout_engine(run_config(engine="auto"), policy, processors()[0], ALONE)
    assert engine.name == "hf"
    out = capsys.readouterr().out
    assert said in out and out.count("\n") == 1
    rollout.make_rollout_engine(run_config(engine="hf"), policy, processors()[0], ALONE)
    assert capsys.readouterr().out == ""


def test_a_setting_that_vllm_cannot_take_is_one_line(world, policy):
    corrected = {"old_logp": "recompute"}
    config = run_config(engine="vllm", quantization="fp8", max_response_tokens=8, algorithm=corrected)
    with pytest.raises(
        UserError, match=r"^rollout.engine vllm: torch.float32 is not supported .*fp8.*rollout.engine=hf$"
    ):
        VLLMRollout(config, policy, [0], 0, ALONE)


def test_ranks_that_cannot_be_shared_out_over_engines(world, policy):
    with pytest.raises(UserError, match="rollout.tensor_parallel 2 does not divide the 1 ranks"):
        VLLMRollout(run_config(engine="vllm", tensor_parallel=2), policy, [0], 0, ALONE)
