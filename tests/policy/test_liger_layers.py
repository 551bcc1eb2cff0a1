"""liger-kernel's layers: log-probs and gradients do not change; where the layers cannot run, model.liger=on is an error.

The kernels run in Triton's interpreter, in a separate process, because the patch of transformers cannot be undone.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from option_helpers import options
from policy_helpers import model_dir

from mssr.errors import UserError
from mssr.policy.loading import load_policy


@pytest.fixture(scope="module")
def compared():
    """Return the JSON that liger_comparison.py prints."""
    model_dir()  # the process reads it
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("liger_comparison.py")],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}, capture_output=True, text=True, timeout=170,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", ["whole", "lora"])
def test_log_probs_and_gradients_are_those_of_the_layers_replaced(compared, kind):
    found = compared[kind]
    assert found["logp"] < 1e-5
    assert len(found["gradients"]) == (found["trained"]) > 10
    assert max(found["gradients"].values()) < 1e-5


def test_what_is_replaced_and_what_stays(compared):
    assert compared["said"] == [
        "model.liger: liger-kernel computes 9 LigerRMSNorm, 2 LigerSwiGLUMLP and the rotary positions"
    ]
    assert compared["rotary_calls"] > 0
    assert compared["head"] == "FusedLMHead"
    assert compared["forward"] == "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl"
    assert compared["names"]


@pytest.mark.parametrize("setting", ["auto", "off"])
def test_without_a_gpu_the_layers_stay(setting):
    policy = load_policy(model_dir(), torch.float32, options(liger=setting))
    assert not any(module._get_name().startswith("Liger") for module in policy.model.modules())


def test_asked_for_without_a_gpu():
    with pytest.raises(
        UserError, match="^model.liger on: its kernels need a GPU; run on one, or set model.liger=auto$"
    ):
        load_policy(model_dir(), torch.float32, options(liger="on"))


def test_asked_for_without_the_package(monkeypatch):
    monkeypatch.setattr("mssr.policy.liger.find_spec", lambda name: None)
    with pytest.raises(UserError, match="^model.liger on: liger-kernel is not installed; pip install"):
        load_policy(model_dir(), torch.float32, options(liger="on"), torch.device("cuda"))
