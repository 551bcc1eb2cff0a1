"""How the backend is chosen, and what `explain` predicts for a call."""

import pytest
import torch
from test_work_and_memory import WORKSPACE, D, N, Recorder, V, leaves, policy_loss_work

from mssr_kernels import explain, linear_logprob_entropy
from mssr_kernels.backends import choice

SEVEN_B = dict(n=8192, d=3584, v=152064)
NDV = 2 * 8192 * 3584 * 152064


def test_auto_goes_by_device_dtype_and_shape_but_never_by_the_number_of_tokens():
    assert explain(**SEVEN_B).backend == "triton"
    assert explain(1, 3584, 152064).backend == explain(1 << 20, 3584, 152064).backend == "triton"
    assert explain(**SEVEN_B, dtype=torch.float32).backend == "chunked"
    assert explain(**SEVEN_B, dtype=torch.float64).backend == "chunked"
    assert explain(**SEVEN_B, device="cpu").backend == "chunked"
    assert explain(8192, 3584, 1000).backend == "chunked"
    assert explain(8192, 64, 152064).backend == "chunked"
    assert explain(**SEVEN_B, workspace_bytes=32 << 20, loss=False).backend == "chunked"  # fits fewer than 128 rows
    cuda = torch.device("cuda")
    assert choice.resolve("auto", cuda, torch.bfloat16, 3584, 152064, 256 << 20) == "triton"
    assert choice.resolve("auto", cuda, torch.bfloat16, 3584, 152064, 256 << 20, contiguous=False) == "chunked"
    for name in ("chunked", "triton", "reference"):
        assert explain(**SEVEN_B, backend=name).backend == name


def test_a_named_backend_that_cannot_run_is_an_error():
    with pytest.raises(TypeError, match="'triton' takes float32, bfloat16 or float16"):
        explain(**SEVEN_B, dtype=torch.float64, backend="triton")
    with pytest.raises(ValueError, match="backend 'cuda' is not available"):
        explain(**SEVEN_B, backend="cuda")


def test_flops_of_the_modes():
    assert explain(**SEVEN_B).flops == 3 * NDV and explain(**SEVEN_B).mode == "exact"
    assert explain(**SEVEN_B, vocab_drop_tol=2**-8).mode == "sparse"
    assert explain(**SEVEN_B, loss=False).flops == 4 * NDV
    assert explain(**SEVEN_B, weight_grad=False).flops == 2 * NDV  # a frozen head
    assert explain(**SEVEN_B, loss=False, weight_grad=False).flops == 3 * NDV
    forward = explain(**SEVEN_B, hidden_grad=False, weight_grad=False)
    assert forward.flops == NDV and forward.mode == "forward" and forward.gradient_bytes == 0


def test_what_is_said_is_what_happens():
    """The plan's chunks, FLOPs and memory match those recorded during a call on the CPU."""
    plan = explain(N, D, V, dtype=torch.float32, device="cpu", workspace_bytes=WORKSPACE)
    recorder = policy_loss_work(*leaves())
    assert recorder.work * 2 * D * V == pytest.approx(plan.flops)
    assert plan.chunks * plan.chunk_rows >= N > (plan.chunks - 1) * plan.chunk_rows
    assert recorder.peak_bytes <= plan.workspace_bytes + plan.gradient_bytes + 16 * N * D * 4
    assert recorder.largest <= V * (plan.chunk_rows + 16) * 4 and recorder.largest >= V * plan.chunk_rows * 4

    plan = explain(N, D, V, dtype=torch.float32, device="cpu", workspace_bytes=WORKSPACE, loss=False)
    hidden, weight, target = leaves()
    with Recorder() as recorder:
        linear_logprob_entropy(hidden, weight, target, workspace_bytes=WORKSPACE).logp.sum().backward()
    assert recorder.work * 2 * D * V == pytest.approx(plan.flops)
    assert recorder.peak_bytes <= plan.workspace_bytes + plan.gradient_bytes + 16 * N * D * 4
    assert plan.gradient_bytes == 4 * V * D + 8 * N * D


def test_nothing_to_do_is_planned_too():
    assert explain(0, 16, 300, device="cpu").flops == explain(0, 16, 300, device="cpu").chunks == 0


def test_it_reads_as_a_line():
    line = str(explain(**SEVEN_B))
    assert "backend triton, mode exact" in line and "26.79 TFLOP" in line and "workspace 256 MiB" in line
    assert "a slab of columns" in str(explain(**SEVEN_B, loss=False))
    assert "\n" not in line
