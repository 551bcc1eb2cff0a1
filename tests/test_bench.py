"""The benchmark commands run and report what they measured."""

import json
import os
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from transformers import AutoModelForImageTextToText

from bench import machine, models, step, step_case, sync, sync_case, tables, tolerance
from bench.estimate_models import step_bytes
from bench.jobs import Package
from bench.report import load
from examples.tiny.model import train_tokenizer
from mssr.distributed import start_world


def test_tolerance(tmp_path):
    file = tmp_path / "out.json"
    tolerance.main(["--n", "32", "--d", "64", "--v", "3000", "--device", "cpu", "--json", str(file)])
    for result in json.loads(file.read_text())["rows"].values():
        errors = result["errors"]
        assert max(errors["2^-14"]) <= 2 * max(errors["exact"]) < max(errors["eager"])
        assert result["recommended"] <= -1


STEP = ["--size", "65k", "--device", "cpu"]
SYNC = ["--model", "500m", "--modes", "zero2", "--device", "cpu"]
TOLERANCE = ["--n", "32768", "--v", "152064", "--device", "cpu"]


@pytest.mark.parametrize(
    "command, words, line",
    [
        (step, [*STEP, "--heads", "mssr"], "mssr, --size 65k, 2,048 tokens: needs about"),
        (sync, SYNC, "500m, zero2, ranks 2: needs about"),
        (tolerance, TOLERANCE, "N 32,768, D 1,024, V 152,064, bfloat16: needs about"),
    ],
    ids=["step", "sync", "tolerance"],
)
def test_what_does_not_fit_is_refused_before_anything_starts(command, words, line, monkeypatch, capsys):
    monkeypatch.setattr(machine, "free_bytes", lambda device: 1 << 30)
    monkeypatch.setattr(sync, "why_no_vllm", lambda device: None)
    monkeypatch.setattr("bench.child.events", None)  # starts no process
    monkeypatch.setattr("bench.inputs.make", None)
    with pytest.raises(SystemExit) as refused:
        command.main(words)
    (said,) = capsys.readouterr().err.splitlines()
    assert refused.value.code == 2
    assert said.startswith(f"not run: {line}") and "1.0 GiB are free; " in said


def test_a_head_that_does_not_fit_is_skipped(monkeypatch, capsys):
    """Of the heads, eager alone holds all logits."""
    monkeypatch.setattr(machine, "free_bytes", lambda device: 3 << 30)
    monkeypatch.setattr(step, "roof", lambda *_: {"tflops": 1.0})
    monkeypatch.setattr(step, "result", lambda head, *_, **__: {"head": head})
    cases = step.measure(step.parse_arguments([*STEP, "--heads", "eager", "mssr"]))["cases"]
    assert "needs about" in cases[0]["skipped"] and "skipped" not in cases[1]
    assert "1 head, up to about 2.8 GiB of memory; 3.0 GiB are free" in capsys.readouterr().err


def test_estimates_of_an_update_are_those_of_a_recorded_run():
    (file,) = Path(step.__file__).parent.glob("results/cpu-epyc*/step.json")
    recorded = load(file)
    for found in recorded["cases"]:
        estimated = step_bytes({**recorded["settings"], "head": found["head"], "device": "cpu"}) / 2**30
        assert found["peak_gib"] < estimated < 1.5 * found["peak_gib"]


@pytest.mark.slow("16 s: two ranks that start vLLM")
@pytest.mark.skipif(torch.version.cuda is not None, reason="on a GPU `make gpu` measures it")
def test_sync_of_weights():
    settings = "--model tiny --modes zero2 --ranks 2 --repeats 2 --device cpu"
    report = sync.measure(sync.parse_arguments(settings.split()))
    printed = tables.sync(report)
    assert [(case["mode"], case["ranks"]) for case in report["cases"]] == [("zero2", 2)]
    for case in report["cases"]:
        assert {"seconds", "peak_extra_mib"} <= set(case), case
        low, high = case["seconds_spread"]
        assert 0 < low <= case["seconds"] <= high
        assert case["bytes"] == 4 * case["parameters"] == pytest.approx(case["bytes_per_second"] * case["seconds"])
        assert case["peak_extra_mib"] > 0
        assert case["parameters"] == parameters_of_tiny()
        assert f"{case['parameters']:,}" in printed
    assert report["machine"]["torch"] and report["settings"]["dtype"] == "float32"


def test_a_sync_that_cannot_run_here_is_skipped():
    with patch.object(sync, "why_no_vllm", lambda _: None):
        assert sync.why_not({"size": "7b", "mode": "zero0"}, "cpu") == "needs a CUDA device"
        assert "files" in sync.why_not({"size": "7b", "mode": "zero3"}, "cuda")
        assert sync.why_not({"size": "7b", "mode": "zero0"}, "cuda") is None


@pytest.mark.slow("12 s: updates with three heads, one in a process of its own")
@pytest.mark.skipif(torch.version.cuda is not None, reason="on a GPU `make gpu` measures it")
def test_step_with_each_head():
    """The trainer's head runs in a process of its own, as in the command; the others run here."""
    arguments = step.parse_arguments(["--heads", "mssr", "--repeats", "1", "--tokens", "300", "--device", "cpu"])
    report = step.measure(arguments)
    own = report["cases"][0]
    assert "seconds" in own, own
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    with patch.dict(os.environ, alone):
        world = start_world("cpu")
        others = [
            {"head": head, "work": "x", **step_case.measure(world, vars(arguments) | {"head": head})}
            for head in ("eager", "liger")
        ]
    cases = [own, *others]
    step.compare(report | {"cases": cases})
    assert all(case["agrees"] for case in cases), [case["differs"] for case in cases]
    assert own["mfu"] == pytest.approx(own["tflops"] / report["roof"]["tflops"])
    shaped, unshaped = own["checked"]["shaped"], own["checked"]["unshaped"]
    assert shaped["loss"] < unshaped["loss"]  # shaping adds to every advantage
    for case in cases:
        low, high = case["seconds_spread"]
        assert 0 < low <= case["seconds"] <= high
        assert case["tokens_per_second"] == pytest.approx(300 / case["seconds"])
        assert case["mfu"] > 0
        assert 0 < case["held_gib"] < case["peak_gib"]
        assert case["parameters"] == case["trained"] == parameters_of(models.config("tiny"))
    printed = tables.step(report | {"cases": cases})
    assert all(head in printed for head in step.HEADS) and "differs" not in printed


def test_a_head_that_differs_is_reported():
    checked = {kind: {"loss": 1.0, "grad_norm": 2.0} for kind in ("shaped", "unshaped")}
    times = {"seconds": 1.0, "extra_gib": 1.0, "tflops": 0.5}
    wrong = checked | {"shaped": {"loss": 1.0, "grad_norm": 2.01}}
    liger = checked | {"shaped": {"loss": 9.0, "grad_norm": 9.0}}
    found = {"eager": checked, "mssr": wrong, "liger": liger}
    cases = [{"head": head, "checked": values, **times} for head, values in found.items()]
    failed = {"head": "another", "error": "out of memory"}
    step.compare({"settings": {"dtype": "float32"}, "roof": {"tflops": 2.0}, "cases": [*cases, failed]})
    assert [case["agrees"] for case in cases] == [True, False, True]  # Liger has no shaping, so nothing to agree on
    assert cases[0]["mfu"] == 0.25


def test_a_head_that_is_not_installed_is_not_failed(capsys):
    head = step.HEADS["liger"]
    absent = head._replace(provider=head.provider._replace(package=Package("no_such_module", "no-such-package")))
    words = ["--heads", "liger", "--tokens", "300", "--device", "cpu"]
    with patch.dict(step.HEADS, {"liger": absent}):
        assert step.main(words) == 0
    printed = capsys.readouterr()
    assert "not installed: pip install no-such-package" in printed.out and "failed" not in printed.out + printed.err


def test_a_sync_without_vllm_is_not_failed(capsys):
    with patch.object(sync, "why_no_vllm", lambda _: "vLLM is not installed; run this"):
        assert sync.main(["--model", "tiny", "--modes", "zero0", "--device", "cpu"]) == 0
    assert "vLLM is not installed; run this" in capsys.readouterr().out


def test_a_model_that_a_cpu_cannot_hold_is_refused(capsys):
    with pytest.raises(SystemExit):
        step.parse_arguments(["--size", "7b", "--device", "cpu"])
    assert "is for a GPU" in capsys.readouterr().err


def parameters_of(config) -> int:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def parameters_of_tiny() -> int:
    tokenizer = train_tokenizer(["digit"], 300)
    return parameters_of(sync_case.model_config("tiny", tokenizer, "float32"))
