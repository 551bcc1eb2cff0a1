"""`mssr sft`, the warm start."""

import json

import pyarrow.parquet
import pytest
import torch
import yaml
from mssr_process import Moment
from run_folder import RunFolder
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
    batch = demonstrations(prompts, tokenizer)
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


SHORT = ["sft.steps=5", "sft.eval_every=3", "train.checkpoint_every=2", "sft.optimizer.schedule=cosine"]


@pytest.fixture(scope="module")
def uninterrupted(mssr, warm, tmp_path_factory):
    run = RunFolder(tmp_path_factory.mktemp("sft") / "run")
    mssr("sft", warm, run.override, *SHORT).check()
    return run


def test_ctrl_c_saves_the_step(mssr, warm, run, uninterrupted):
    """Killed while it saves step 2, then interrupted in the next step."""
    killed = mssr("sft", warm, run.override, *SHORT, at=Moment("os.rename", ".partial_step_000002"))
    assert killed.code == -9
    ended = mssr("sft", warm, run.override, *SHORT, "--resume", at=Moment("os.mkdir", ".partial_step_000002", "int"))
    assert ended.code == 130 and ended.err.splitlines()[-1].startswith("mssr: SIGINT: saved step")
    said = mssr("sft", warm, run.override, *SHORT, "--resume").check().out
    assert "--resume: goes on after step" in said
    run.assert_same_as(uninterrupted)


def test_a_finished_one_says_so(mssr, warm, uninterrupted):
    ended = mssr("sft", warm, uninterrupted.override, *SHORT, "--resume").check()
    assert "the run has ended after step 5: sft.steps is 5; raise it to train on" in ended.out
    assert f"validation accuracy {uninterrupted.metrics[-1]['val/accuracy']:.1%}" in ended.out
    assert "sft.batch_size is 16" in mssr("sft", warm, uninterrupted.override, "sft.batch_size=16", "--resume").line


@pytest.mark.parametrize("column", ["solution", "answer"])
def test_it_resumes_only_on_the_same_rows(mssr, warm, uninterrupted, tmp_path, column):
    rows = pyarrow.parquet.read_table(warm.parent / "data" / "train.parquet").to_pylist()
    rows[3][column] += "0"
    file = tmp_path / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    line = mssr("sft", warm, uninterrupted.override, *SHORT, f"data.train={file}", "--resume").line
    assert line == f"data.train {file} is not what the checkpoint was trained on; restore it, or set another run_dir"
