"""`bench.kernels`: its report, its float64 values, and that failures and wrong results are visible."""

import json
import re
import time
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from bench import (
    accuracy,
    cases,
    child,
    estimate,
    gpu,
    inputs,
    kernels,
    machine,
    report,
    scaling,
    step,
    sync,
    tolerance,
)
from bench.jobs import (
    CROSS_ENTROPY,
    OBJECTIVES,
    POLICY,
    TASKS,
    UNSHAPED,
    Counts,
    Package,
    Provider,
    Rows,
    Settings,
    loss_of,
)
from bench.providers import CONFIG, PROVIDERS, eager_rows
from bench.shapes import Shape
from mssr_kernels import reference

pytestmark = pytest.mark.usefixtures("compiled_anew")
NO_CCE = "not installed: pip install cut-cross-entropy"
CPU = Settings("cpu", repeats=2, workspace_mib=1)
SHAPE = Shape(None, 64, 32, 2048, "float32", "realistic")
ON_CPU = [
    "eager",
    "mssr exact",
    "mssr sparse",
    "mssr recompute",
    "mssr forward",
    "liger GRPO",
    "liger scaled CE",
    "trl",
]
ON_CPU += ["torch linear CE"]


HEAD_OF_7B = ["--model", "qwen2.5-vl-7b", "--device", "cpu"]


def test_what_does_not_fit_is_refused_before_anything_starts(monkeypatch, capsys):
    monkeypatch.setattr(machine, "free_bytes", lambda device: 20 << 30)
    monkeypatch.setattr(kernels.Run, "part", None)  # starts no process
    with pytest.raises(SystemExit) as refused:
        kernels.main([*HEAD_OF_7B, "--n", "32768"])
    (line,) = capsys.readouterr().err.splitlines()
    assert refused.value.code == 2
    assert "N 32,768, D 3,584, V 152,064, float32: needs about" in line and "20.0 GiB are free" in line
    (fits,) = re.findall(r"--n (\d+) would fit", line)

    both = kernels.parse_arguments([*HEAD_OF_7B, "--n", "32768", fits])
    run = kernels.Run({"not_run": []}, None, Settings("cpu"))
    assert [shape.n for shape in run.fitting(kernels.shapes_of(both))] == [int(fits)]
    assert len(run.report["not_run"]) == 1
    assert "1 shape, up to about" in capsys.readouterr().err

    monkeypatch.setattr(machine, "free_bytes", lambda device: 2 << 30)
    with pytest.raises(SystemExit):
        kernels.main(HEAD_OF_7B)
    assert "no number of tokens would fit" in capsys.readouterr().err


def committed(name):
    (file,) = Path(kernels.__file__).parent.glob(f"results/cpu-epyc*/{name}.json")
    return report.load(file)


@pytest.mark.parametrize("name", ["kernels", "kernels_wide"])
def test_estimates_are_those_of_recorded_runs(name):
    recorded = committed(name)
    settings, (case, *_) = Settings(**recorded["settings"]), recorded["cases"]
    shape = Shape(*(case[key] for key in Shape._fields))
    eager = case["providers"]["eager"]["peak_extra_mib"] * 2**20
    assert eager == pytest.approx(estimate.LOGIT["float32"] * shape.n * shape.v, rel=0.02)
    assert eager < estimate.job_bytes(shape) < estimate.peak_bytes(shape, settings)
    ran = [found for case in recorded["cases"] for found in case["providers"].values() if "seconds" in found]
    took = sum(found["seconds"] for found in ran) * (settings.repeats + settings.input_sets)
    tasks, names = [case["task"] for case in recorded["cases"]], list(case["providers"])
    assert took < estimate.seconds(shape, tasks, names, settings, recorded["roofs"]) < 3 * took


def test_no_gpu_and_other_mistakes_are_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for command in (kernels.main, scaling.main, step.main, sync.main, tolerance.main):
        with pytest.raises(SystemExit) as ended:
            command(["--device", "cuda"])
        (line,) = capsys.readouterr().err.splitlines()
        assert ended.value.code == 2 and "--device: cuda, but torch" in line
    with pytest.raises(SystemExit) as ended:
        gpu.main([])
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and ": torch " in line
    with pytest.raises(SystemExit):
        kernels.main(["--model", "llama-3.1-8b", "--d", "64"])
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.slow("20 s: the command, with a process for each provider")
def test_report(tmp_path, monkeypatch, capsys):
    """The whole command, with one package that ends its process and one that is not installed or not for this device."""
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
    assert report["machine"]["torch"] and report["settings"]["repeats"] == 3
    loss, forward = report["cases"]
    assert list(loss["providers"]) == ["eager", "mssr sparse", "torch linear CE", "quack CE", "verl torch"]
    assert set(forward["providers"]) == set(loss["providers"]) - {"mssr sparse"}
    for case in report["cases"]:
        assert {key: case[key] for key in ("model", "n", "d", "v")} == {"model": None, "n": 64, "d": 32, "v": 2048}
        assert 0.2 < case["mean_entropy"] < 0.7
        assert case["providers"]["verl torch"]["error"] == "took its process down: exit code 7: out of order"
        assert "error" not in case["providers"]["quack CE"]  # it is not installed, or needs another device
        assert case["providers"]["quack CE"]["skipped"]
        base = case["providers"]["eager"]
        assert base["time_ratio"] == 1
        for name in set(case["providers"]) - {"verl torch", "quack CE"}:
            found = case["providers"][name]
            assert len(found["seconds_all"]) == 3 and min(found["seconds_all"]) > 0
            assert found["seconds"] == sorted(found["seconds_all"])[1]
            turns = sorted(a / b for a, b in zip(found["seconds_all"], base["seconds_all"]))
            assert found["time_ratio"] == pytest.approx(turns[1])
            assert found["peak_extra_mib"] > 0
            of_products = found["flops"] / report["roofs"]["matmul_tflops"]["float32"] / 1e12
            of_memory = found["bytes"] / report["roofs"]["copy_gb_per_s"] / 1e9
            assert found["share_of_roof"] == pytest.approx(max(of_products, of_memory) / found["seconds"])
    assert loss["providers"]["eager"]["flops"] == 3 * forward["providers"]["eager"]["flops"] == 6 * 64 * 32 * 2048
    assert 0 < loss["providers"]["mssr sparse"]["flops"] < loss["providers"]["eager"]["flops"]
    # Eager holds at least two tensors of the size of the logits at a time.
    assert loss["providers"]["eager"]["peak_extra_mib"] > 2 * 64 * 2048 * 4 / 2**20

    printed = capsys.readouterr().out
    assert "failed: took its process down" in printed and "torch linear CE" in printed


@pytest.mark.slow("13 s: every task of every provider")
def test_all_results_are_right_and_what_cannot_run_is_listed():
    """Every task of every provider that runs on a CPU and compiles nothing large."""
    names = [*ON_CPU, "cce exact", "mssr chunked exact"]
    for case in cases.measure(SHAPE, list(TASKS), names, CPU):
        task, providers = case["task"], case["providers"]
        assert set(providers) == {name for name in names if task in PROVIDERS[name].tasks}
        assert providers.pop("cce exact")["skipped"] in ("needs a CUDA device", NO_CCE)
        assert providers.pop("mssr chunked exact", {}).get("skipped") == (
            None if task == "forward" else "needs a CUDA device"
        )
        for name, found in providers.items():
            assert "seconds" in found, found
            rows = {POLICY: {"logp", "entropy"}, CROSS_ENTROPY: {"logp"}, UNSHAPED: set()}[PROVIDERS[name].objective]
            gradients = {"loss": {"d_hidden", "d_weight"}, "frozen": {"d_hidden"}, "forward": set()}[task]
            errors = found["errors"]
            assert set(errors) == rows | gradients
            # `sparse` drops what its tolerance allows, only in the gradients.
            assert all(errors[key] < 1e-4 for key in rows)
            assert all(errors[key] < (5e-3 if name == "mssr sparse" else 1e-4) for key in gradients)


def test_a_wrong_provider_shows():
    def wrong_rows(tensors, settings):
        logp, entropy = eager_rows(tensors)
        return Rows(logp + 0.01 * (logp - logp.detach()), entropy + 0.02)

    wrong = Provider(POLICY, loss_of(wrong_rows), wrong_rows, Counts(1, 2, 3), Counts(0, 0, 0))

    def broken(tensors, settings):
        raise ValueError("no such kernel\nand more")

    others = {
        "wrong": wrong,
        "broken": wrong._replace(loss=broken, rows=broken),
        "absent": wrong._replace(package=Package("no_such_module", "no-such-package")),
    }
    with patch.dict(PROVIDERS, others):
        (case,) = cases.measure(SHAPE, ["loss"], ["eager", *others], CPU)
    errors = case["providers"]["wrong"]["errors"]
    assert errors["entropy"] == pytest.approx(0.02, rel=1e-2) and errors["logp"] < 1e-4
    # 1 % too large, and shaped by a wrong entropy.
    assert 0.005 < errors["d_hidden"] < 0.05 and 0.005 < errors["d_weight"] < 0.05
    assert case["providers"]["broken"] == {"work": POLICY, "error": "ValueError: no such kernel"}
    assert case["providers"]["absent"] == {"work": POLICY, "skipped": "not installed: pip install no-such-package"}


@pytest.mark.parametrize("rows", [64, 40])
def test_exact_values_are_those_of_autograd(rows):
    tensors = inputs.make(64, 32, 2048, torch.float32, "cpu", "realistic", seed=3)
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in tensors[:2]]
    with patch.object(accuracy, "CHUNK_BYTES", 8 * 2048 * 24):  # three chunks, the last one shorter
        for objective in (POLICY, CROSS_ENTROPY, UNSHAPED):
            found = accuracy.exact(tensors, objective, rows)
            logp, entropy, _ = reference.linear_logprob_entropy(*exact_inputs, tensors.target)
            if objective == POLICY:
                loss = reference.linear_policy_loss(*exact_inputs, *tensors[2:5], config=CONFIG).loss
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


def test_presets(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
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
        ["--model", "qwen2.5-vl-3b", "llama-3.1-8b", "--n", "64", "128", "--rows", "flat", "peaked"]
    )
    found = kernels.shapes_of(several)
    assert len(found) == 8 and {(shape.d, shape.v) for shape in found} == {(2048, 151936), (4096, 128256)}
    with pytest.raises(SystemExit):
        kernels.parse_arguments(["--quick", "--n", "64"])
    with pytest.raises(SystemExit):
        kernels.parse_arguments(["--model", "llama-3.1-8b", "--d", "64"])
    own = kernels.parse_arguments(["--n", "64", "--repeats", "3", "--device", "cpu"])
    assert kernels.shapes_of(own) == [Shape(None, 64, 1024, 65536, "float32", "realistic")]
    assert (own.repeats, own.workspace_mib, own.providers) == (3, 256, list(PROVIDERS))


def test_a_process_that_does_not_come_back():
    request = {"kind": "cases", "shape": SHAPE._asdict(), "tasks": ["loss"], "names": ["eager"]}
    request["settings"] = CPU._asdict()
    with pytest.raises(child.OutOfTime, match="out of time"):
        list(child.events("bench.parts", request, ends=time.monotonic() + 0.2, silence=60))
    with pytest.raises(child.Died, match="not done after 0 s") as died:
        list(child.events("bench.parts", request, ends=time.monotonic() + 60, silence=0.2))
    assert not isinstance(died.value, child.OutOfTime)


# A measurement that prints something else first, and fails if asked to.
MEASUREMENT = """
import json, os, sys
request = json.load(sys.stdin)
print("a library's banner", flush=True)
if request["dies"]:
    sys.exit("no such device")
print(json.dumps({"extra": os.environ["EXTRA"]}))
"""


def test_the_result_of_a_process_or_why_it_failed(tmp_path, monkeypatch, capsys):
    (tmp_path / "one_of_bench.py").write_text(MEASUREMENT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert child.result("it", "one_of_bench", {"dies": False}, limit=120, EXTRA=3) == {"extra": "3"}
    failed = child.result("it", "one_of_bench", {"dies": True}, limit=120, EXTRA=3)
    assert failed == {"error": "exit code 1: no such device"}
    assert "it: exit code 1: no such device\na library's banner" in capsys.readouterr().err
