"""`bench.kernels`: what it reports, that its float64 values are right, and that nobody who fails or is wrong is hidden."""

import json
import time
from itertools import pairwise
from unittest.mock import patch

import pytest
import torch

from bench import accuracy, cases, inputs, kernels, losses, processes, tables, targets
from bench.jobs import CROSS_ENTROPY, OBJECTIVES, POLICY, TASKS, UNSHAPED, Counts, Provider, Rows, Settings, loss_of
from bench.providers import CONFIG, PROVIDERS, eager_rows
from bench.shapes import MODELS, Shape
from mssr_kernels import reference

pytestmark = pytest.mark.usefixtures("compiled_anew")
CPU = Settings("cpu", repeats=2, workspace_mib=1)
SHAPE = Shape(None, 64, 32, 2048, "float32", "realistic")
ON_CPU = [
    "eager",
    "mssr reference",
    "mssr exact",
    "mssr sparse",
    "mssr recompute",
    "mssr forward",
    "liger GRPO",
    "liger scaled CE",
    "trl",
]
ON_CPU += ["torch linear CE", "torch linear CE chunked"]


@pytest.mark.slow("20 s: the command, with a process for each provider")
def test_report(tmp_path, monkeypatch, capsys):
    """The whole command, with a package that takes its process down and one that is not there or not for this device."""
    package = tmp_path / "verl" / "utils" / "experimental"
    package.mkdir(parents=True)
    (package / "torch_functional.py").write_text("import os, sys\nsys.stderr.write('out of order')\nos._exit(7)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    names = ["mssr sparse", "torch linear CE", "verl torch", "quack CE"]
    words = [
        "--n",
        "64",
        "--d",
        "32",
        "--v",
        "2048",
        "--rows",
        "realistic",
        "--task",
        "loss",
        "forward",
        "--device",
        "cpu",
    ]
    kernels.main([*words, "--repeats", "3", "--out", str(tmp_path / "out"), "--providers", *names])

    report = json.loads((tmp_path / "out" / "kernels.json").read_text())
    assert [case["task"] for case in report["cases"]] == ["loss", "forward"] and report["not_run"] == []
    assert report["machine"]["torch"] and report["settings"]["repeats"] == 3 and report["seconds"] > 0
    loss, forward = report["cases"]
    assert list(loss["providers"]) == ["eager", "mssr sparse", "torch linear CE", "quack CE", "verl torch"]
    assert set(forward["providers"]) == set(loss["providers"]) - {"mssr sparse"}
    for case in report["cases"]:
        assert {key: case[key] for key in ("model", "n", "d", "v", "softcap")} == {
            "model": None, "n": 64, "d": 32, "v": 2048, "softcap": None,
        }  # fmt: skip
        assert 0.2 < case["mean_entropy"] < 0.7
        assert case["providers"]["verl torch"]["error"] == "took its process down: exit code 7: out of order"
        assert case["providers"]["quack CE"]["error"]
        base = case["providers"]["eager"]
        assert base["time_ratio"] == base["memory_ratio"] == 1
        for name in set(case["providers"]) - {"verl torch", "quack CE"}:
            found = case["providers"][name]
            assert len(found["seconds_all"]) == 3 and min(found["seconds_all"]) > 0
            assert found["seconds"] == sorted(found["seconds_all"])[1]
            turns = sorted(a / b for a, b in zip(found["seconds_all"], base["seconds_all"]))
            assert found["time_ratio"] == pytest.approx(turns[1])
            assert found["memory_ratio"] == pytest.approx(found["peak_extra_mib"] / base["peak_extra_mib"])
            of_products = found["flops"] / report["roofs"]["matmul_tflops"]["float32"] / 1e12
            of_memory = found["bytes"] / report["roofs"]["copy_gb_per_s"] / 1e9
            assert found["share_of_roof"] == pytest.approx(max(of_products, of_memory) / found["seconds"])
    assert loss["providers"]["eager"]["flops"] == 3 * forward["providers"]["eager"]["flops"] == 6 * 64 * 32 * 2048
    sparse = loss["providers"]["mssr sparse"]
    assert 0 < sparse["f"] < 1 and sparse["flops"] < loss["providers"]["eager"]["flops"]
    # At its leanest eager holds two of the size of the logits at a time.
    assert loss["providers"]["eager"]["peak_extra_mib"] > 2 * 64 * 2048 * 4 / 2**20

    printed = capsys.readouterr().out
    assert "verl torch: took its process down" in printed and "torch linear CE" in printed


@pytest.mark.slow("13 s: every task of every provider")
def test_everybody_is_right_and_whoever_cannot_is_listed():
    """Every task of every provider that runs on a CPU and compiles nothing large, with and without a softcap."""
    for softcap, tasks in ((None, TASKS), (30.0, ("loss",))):
        found = {}
        for case in cases.measure(SHAPE._replace(softcap=softcap), list(tasks), [*ON_CPU, "cce exact"], CPU):
            found[case["task"]] = case["providers"]
        assert tuple(found) == tasks
        without = {"liger GRPO", "liger scaled CE", "torch linear CE", "torch linear CE chunked"} if softcap else set()
        for task, providers in found.items():
            here = {name for name in [*ON_CPU, "cce exact"] if task in PROVIDERS[name].tasks}
            assert set(providers) == here
            assert providers.pop("cce exact")["error"] == "needs a CUDA device"
            assert {name for name, result in providers.items() if result.get("error") == "has no softcap"} == without
            for name in set(providers) - without:
                assert "error" not in providers[name], providers[name]
                rows = {POLICY: {"logp", "entropy"}, CROSS_ENTROPY: {"logp"}, UNSHAPED: set()}[
                    PROVIDERS[name].objective
                ]
                gradients = {"loss": {"d_hidden", "d_weight"}, "frozen": {"d_hidden"}, "forward": set()}[task]
                errors = providers[name]["errors"]
                assert set(errors) == rows | gradients
                # Mode `sparse` drops what its tolerance allows, of the gradient alone.
                assert all(errors[key] < 1e-4 for key in rows)
                assert all(errors[key] < (5e-3 if name == "mssr sparse" else 1e-4) for key in gradients)


def test_a_wrong_provider_shows():
    def wrong_rows(tensors, settings):
        logp, entropy = eager_rows(tensors)
        return Rows(logp + 0.01 * (logp - logp.detach()), entropy + 0.02)

    wrong = Provider(POLICY, loss_of(wrong_rows), wrong_rows, Counts(1, 2, 3), Counts(0, 0, 0))

    def broken(tensors, settings):
        raise ValueError("no such kernel\nand more")

    with patch.dict(PROVIDERS, {"wrong": wrong, "broken": wrong._replace(loss=broken, rows=broken)}):
        (case,) = cases.measure(SHAPE, ["loss"], ["eager", "wrong", "broken"], CPU)
    errors = case["providers"]["wrong"]["errors"]
    assert errors["entropy"] == pytest.approx(0.02, rel=1e-2) and errors["logp"] < 1e-4
    # A hundredth too large, and shaped by a wrong entropy.
    assert 0.005 < errors["d_hidden"] < 0.05 and 0.005 < errors["d_weight"] < 0.05
    assert case["providers"]["broken"] == {"work": POLICY, "error": "ValueError: no such kernel"}


@pytest.mark.parametrize("softcap", [None, 8.0])
@pytest.mark.parametrize("rows", [64, 40])
def test_exact_values_are_those_of_autograd(softcap, rows):
    tensors = inputs.make(64, 32, 2048, torch.float32, "cpu", "realistic", seed=3, softcap=softcap)
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in tensors[:2]]
    with patch.object(accuracy, "CHUNK_BYTES", 8 * 2048 * 24):  # three chunks, the last one shorter
        for objective in (POLICY, CROSS_ENTROPY, UNSHAPED):
            found = accuracy.exact(tensors, objective, rows)
            logp, entropy, _ = reference.linear_logprob_entropy(*exact_inputs, tensors.target, softcap=softcap)
            if objective == POLICY:
                loss = reference.linear_policy_loss(*exact_inputs, *tensors[2:5], config=CONFIG, softcap=softcap).loss
            else:
                loss = OBJECTIVES[objective](logp, entropy, tensors)
            d_hidden, d_weight = torch.autograd.grad(loss, exact_inputs)
            torch.testing.assert_close(found.logp, logp[:rows].detach())
            torch.testing.assert_close(found.entropy, entropy[:rows].detach())
            torch.testing.assert_close(found.d_hidden, d_hidden[:rows], rtol=1e-9, atol=1e-14)
            assert (found.d_weight is None) == (rows < 64)
            if rows == 64:
                torch.testing.assert_close(found.d_weight, d_weight, rtol=1e-9, atol=1e-14)


def test_rows_in_float64_have_a_limit():
    assert accuracy.rows_of(512, 256, 16384, "cpu") == 512
    assert 1 <= accuracy.rows_of(8192, 3584, 152064, "cpu") < 8192 == accuracy.rows_of(8192, 3584, 152064, "cuda")


def test_turns_are_fair():
    names = list("abcd")
    orders = [cases.order(names, turn) for turn in range(16)]
    assert all(sorted(order) == names for order in orders)
    for place in range(4):
        assert {order[place] for order in orders} == set(names)
    assert {first + second for order in orders for first, second in pairwise(order)} >= {"ab", "ba", "cd", "dc"}


def test_presets():
    quick = kernels.parse_arguments(["--quick", "--device", "cpu"])
    assert quick.repeats >= 20 and set(quick.task) == set(TASKS) and len(kernels.shapes_of(quick)) == 1
    assert {"eager", "torch.compile", "mssr exact", "mssr sparse", "liger GRPO", "trl", "cce torch_compile"} < set(
        quick.providers
    )
    full = kernels.parse_arguments(["--full", "--device", "cuda"])
    heads = {(shape.model, shape.n) for shape in kernels.shapes_of(full)}
    assert heads == {(f"qwen2.5-vl-{size}", n) for size in ("3b", "7b") for n in (2048, 8192, 32768)}
    assert full.minutes < 9
    several = kernels.parse_arguments(
        ["--model", "gemma-2-9b", "llama-3.1-8b", "--n", "64", "128", "--rows", "flat", "peaked"]
    )
    found = kernels.shapes_of(several)
    assert len(found) == 8 and {shape.softcap for shape in found if shape.model == "gemma-2-9b"} == {30.0}
    assert (MODELS["llama-3.1-8b"].d, MODELS["llama-3.1-8b"].v) == (4096, 128256)
    with pytest.raises(SystemExit):
        kernels.parse_arguments(["--quick", "--n", "64"])


def test_a_process_that_does_not_come_back():
    request = {"shape": SHAPE._asdict(), "tasks": ["loss"], "names": ["eager"], "settings": CPU._asdict()}

    def listen(ends, silence):
        return list(processes.events("bench.kernel_parts", "cases", request, ends, silence))

    with pytest.raises(processes.OutOfTime, match="out of time"):
        listen(time.monotonic() + 0.2, 60)
    with pytest.raises(processes.Died, match="not done after 0 s") as died:
        listen(time.monotonic() + 60, 0.2)
    assert not isinstance(died.value, processes.OutOfTime)


def result(seconds, mib, work=POLICY):
    return {"work": work, "seconds": seconds, "seconds_all": [seconds], "peak_extra_mib": mib, "errors": {}}


def case_of(**providers):
    names = {name.replace("_", " "): found for name, found in providers.items()}
    return {**SHAPE._asdict(), "task": "loss", "mean_entropy": 0.4, "providers": names}


def test_where_we_lose_is_said():
    case = case_of(
        eager=result(2.0, 100), quick=result(0.5, 20, f"{CROSS_ENTROPY}; no log-probs"), fair=result(0.9, 30),
        gone={"work": POLICY, "error": "no"}, mssr_exact=result(1.0, 10), mssr_recompute=result(0.8, 25),
        mssr_reference=result(9, 999),
    )  # fmt: skip
    said = losses.sentences({"cases": [case]}, lambda case: "here")
    assert said == [
        "here: fair is faster (900 ms) than mssr exact (1,000).",
        "here: quick (less work: cross-entropy alone) is faster (500 ms) than mssr exact (1,000), mssr recompute (800) "
        "and smaller (20 MiB) than mssr recompute (25).",
    ]
    del case["providers"]["fair"], case["providers"]["quick"]
    assert losses.sentences({"cases": [case]}, lambda case: "here") == []


def test_gpu_figures_beside_targets():
    """7B head, bf16, N 8192: 2 NDV is 8.93 TFLOP; dW is 1.015 GiB in bf16, and mode exact accumulates it in float32."""
    case = case_of(mssr_exact=result(0.040, 3600), mssr_sparse=result(0.041, 3600)) | {
        "dtype": "bfloat16",
        "rows": "flat",
    }
    case |= {"model": "qwen2.5-vl-7b", "n": 8192, "d": 3584, "v": 152064}
    for found in case["providers"].values():
        found |= {"flops": 2.68e13, "bytes": 1e9}
    targets.with_rates(case, {"matmul_tflops": {"bfloat16": 790}, "copy_gb_per_s": 4000})
    found = case["providers"]["mssr exact"]
    assert found["tflops"] == pytest.approx(670) and found["share_of_roof"] == pytest.approx(670 / 790)
    assert found["beyond_dw_gib"] == pytest.approx(3600 / 1024 - 6 * 152064 * 3584 / 2**30)
    lines = {line["what"]: line for line in targets.beside_targets([case, case | {"rows": "realistic"}], None)}
    assert (
        lines["ours, exact"]["time_met"]
        and lines["ours, exact"]["memory_met"]
        and lines["ours, exact"]["measured"].endswith("met")
    )
    assert lines["ours, sparse, flat rows"]["met"] and lines["ours, sparse, flat rows"]["measured"] == "1.02x"
    assert lines["QuACK CE (no entropy, no RL)"]["measured"] == "not run"
    assert "mssr exact" in str(tables.table(case).columns[0]._cells)
