"""`mssr sft`, the warm start."""

import json

import torch
import yaml
from transformers import AutoModelForImageTextToText

from mssr.batch import Prompt
from mssr.data.prompts import load_processors
from mssr.observe.metrics import read_metrics
from mssr.training.sft import demonstrations


def test_it_learns_the_solutions(warm):
    lines = read_metrics(warm.parent / "sft" / "metrics.jsonl")
    assert lines[0]["sft/loss"] > 5 > 1 > lines[-1]["sft/loss"]  # at first, the log of the vocabulary size
    assert lines[0]["sft/lr"] == 3e-3  # the full rate from the first step on
    AutoModelForImageTextToText.from_pretrained(warm.parent / "sft" / "model")


def test_a_demonstration_is_the_solution_with_its_end_and_no_padding(material):
    tokenizer, _ = load_processors(str(material / "untrained"))
    solutions = ["\\boxed{12}", "3"]
    prompts = [
        Prompt(str(row), row, "?", "?", text, torch.tensor([1]), None, None, ()) for row, text in enumerate(solutions)
    ]
    batch = demonstrations(prompts, tokenizer, "here")
    for row, text in enumerate(solutions):
        *words, end = batch.tokens[row][batch.mask[row]].tolist()
        assert tokenizer.decode(words) == text and end == tokenizer.eos_token_id
    assert batch.mask[0].all()


def test_it_stops_at_the_accuracy_asked_for(mssr, warm, tmp_path):
    overrides = ["sft.steps=30", "sft.eval_every=1", "sft.stop_at_accuracy=0.03"]
    shown = mssr("sft", warm, f"run_dir={tmp_path / 'run'}", *overrides).check().out
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(lines) < 30
    assert all(line["val/accuracy"] < 0.03 for line in lines[:-1])
    assert lines[-1]["val/accuracy"] >= 0.03
    assert f"validation accuracy {lines[-1]['val/accuracy']:.1%}" in shown
    assert f"mssr: warm start of {yaml.safe_load(warm.read_text())['model']['path']}" in shown.splitlines()[0]
    assert shown.splitlines()[-1] == f"model      {tmp_path / 'run' / 'model'}"
    assert (tmp_path / "run" / "model" / "config.json").is_file()


def test_a_row_without_a_solution_is_named(mssr, warm, tmp_path):
    rows = [
        {"problem": f"What is {i} + {i}?", "answer": str(2 * i), "solution": f"\\boxed{{{2 * i}}}"} for i in range(8)
    ]
    del rows[5]["solution"]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = mssr("sft", warm, f"run_dir={tmp_path / 'run'}", f"sft.data={file}", "sft.batch_size=8").line
    assert line.startswith(f"{file}, row 5: no `solution`")


def test_an_earlier_run_is_kept(mssr, warm):
    before = (warm.parent / "sft" / "metrics.jsonl").read_bytes()
    assert "run_dir" in mssr("sft", warm, f"run_dir={warm.parent / 'sft'}").line
    assert (warm.parent / "sft" / "metrics.jsonl").read_bytes() == before
