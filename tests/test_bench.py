"""The benchmark's commands run and leave the figures they print."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from transformers import AutoModelForImageTextToText

from bench import step, step_case, sync, sync_case, targets
from examples.digits.tiny_model import train_tokenizer

ROOT = Path(__file__).parents[1]
SMALL = ["--n", "64", "--d", "32", "--v", "2048", "--device", "cpu"]


def bench(module, *arguments):
    run = subprocess.run(
        [sys.executable, "-m", f"bench.{module}", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


def test_tolerance(tmp_path):
    bench("tolerance", *SMALL, "--json", tmp_path / "out.json")
    report = json.loads((tmp_path / "out.json").read_text())
    for result in report["rows"].values():
        errors = result["errors"]
        assert max(errors["2^-14"]) <= 2 * max(errors["exact"]) < max(errors["eager"])
        assert result["recommended"] <= -1


@pytest.mark.slow("16 s: two ranks that start vLLM")
@pytest.mark.skipif(torch.version.cuda is not None, reason="on a GPU `make gpu` measures it")
def test_sync_of_weights(capsys):
    settings = "--sizes tiny --modes zero2 --ranks 2 --repeats 2 --device cpu"
    report = sync.measure(sync.parse_arguments(settings.split()))
    sync.print_report(report)
    printed = capsys.readouterr().out
    assert [(case["mode"], case["ranks"]) for case in report["cases"]] == [("zero2", 2)]
    for case in report["cases"]:
        assert {"seconds", "peak_extra_mib"} <= set(case), case
        low, high = case["seconds_spread"]
        assert 0 < low <= case["seconds"] <= high
        assert case["bytes"] == 4 * case["parameters"] == pytest.approx(case["bytes_per_second"] * case["seconds"])
        assert case["peak_extra_mib"] > 0 and case["peak_extra_mib_with_heap"] > 0 and case["resident_gib"] > 0
        assert case["peak_extra_mib_of_gathering"] < case["peak_extra_mib"]  # up to ZeRO-2 no weight is copied for it
        assert case["parameters"] == parameters_of_tiny()
        other = case["per_parameter"]
        assert other["seconds"] > 0 and other["peak_extra_mib"] > 0 and other["time_ratio"] > 0
        assert f"{case['parameters']:,}" in printed
    assert report["machine"]["torch"] and report["settings"]["dtype"] == "float32"


def test_sync_that_does_not_fit_is_skipped():
    arguments = sync.parse_arguments(["--model", "7b", "--modes", "zero0", "zero3", "--device", "cpu"])
    with patch.object(sync, "available_bytes", lambda: 16 << 30):
        cases = sync.measure(arguments)["cases"]
    assert "16 are available" in cases[0]["skipped"] and "files" in cases[1]["skipped"]


def test_sync_beside_its_target():
    case = {"seconds": 0.9, "peak_extra_mib": 1024}
    assert targets.beside_sync(case)["measured"].endswith(": met")
    assert targets.beside_sync(case | {"peak_extra_mib": 1200})["measured"].endswith("missed memory")
    assert targets.beside_sync(None)["measured"] == "not run"
    assert targets.beside_targets([], {"skipped": "no vLLM"})[-1]["measured"] == "skipped: no vLLM"


@pytest.mark.slow("12 s: updates with three heads, one in a process of its own")
@pytest.mark.skipif(torch.version.cuda is not None, reason="on a GPU `make gpu` measures it")
def test_step_with_each_head(capsys):
    """The trainer's head in a process of its own, as the command runs it; the others here."""
    arguments = step.parse_arguments(["--heads", "mssr", "--repeats", "1", "--tokens", "300", "--device", "cpu"])
    report = step.measure(arguments)
    own = report["cases"][0]
    assert "seconds" in own, own
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    with patch.dict(os.environ, alone):
        others = [step.measure_here(head, arguments) for head in ("eager", "liger")]
    cases = [own, *others]
    step.compare(cases, "float32")
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
        assert case["parameters"] == case["trained"] == parameters_of(step_case.SIZES["tiny"].config())
    step.print_report(report | {"cases": cases})
    printed = capsys.readouterr().out
    assert all(head in printed for head in step.HEADS) and "TOO MUCH" not in printed


def test_a_head_that_differs_is_told():
    checked = {kind: {"loss": 1.0, "grad_norm": 2.0} for kind in ("shaped", "unshaped")}
    times = {"seconds": 1.0, "extra_gib": 1.0}
    wrong = checked | {"shaped": {"loss": 1.0, "grad_norm": 2.01}}
    liger = checked | {"shaped": {"loss": 9.0, "grad_norm": 9.0}}
    found = {"eager": checked, "mssr": wrong, "liger": liger}
    cases = [{"head": head, "checked": values, **times} for head, values in found.items()]
    step.compare([*cases, {"head": "mssr", "error": "out of memory"}], "float32")
    assert [case["agrees"] for case in cases] == [True, False, True]  # Liger has no shaping to agree on


def test_longest_step():
    def attempt(tokens: int) -> dict:
        return {} if tokens <= 9_000 else {"error": "no", "output": "CUDA out of memory"}

    for start in (512, 16_384):
        found = step.longest(attempt, start)
        assert 9_000 * 15 / 16 - 1 <= found["tokens"] <= 9_000
    broken = step.longest(lambda tokens: {"error": "no such file", "output": ""}, 512)
    assert "no such file" in broken["error"]


def test_step_that_does_not_fit_is_skipped():
    arguments = step.parse_arguments(["--size", "7b", "--heads", "mssr", "--dtype", "bfloat16", "--device", "cpu"])
    with patch.object(step, "available_bytes", lambda: 16 << 30):
        report = step.measure(arguments)
    assert "16 are available" in report["cases"][0]["skipped"] and report["predicted_gib"] > 60


def parameters_of(config) -> int:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def parameters_of_tiny() -> int:
    tokenizer = train_tokenizer(["digit"], 300)
    return parameters_of(sync_case.model_config(sync_case.SIZES["tiny"], tokenizer, "float32"))


def test_the_longest_that_fits_is_found():
    def attempt(tokens):
        return {} if tokens <= 5000 else {"error": "exit code 1", "output": "[enforce fail] cannot allocate memory"}

    found = step.longest(attempt, 512)
    assert 5000 * 15 / 16 < found["tokens"] <= 5000 and found["tried"][8192] == "exit code 1"
    assert step.longest(lambda tokens: attempt(10**6), 512)["tokens"] < 512
    broken = step.longest(lambda tokens: {"error": "exit code 1", "output": "KeyError: 'head'"}, 512)
    assert broken["error"] == "512 tokens: exit code 1"
