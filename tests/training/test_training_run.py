"""A run from start to end, through the command line."""

import json
import math
import re
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

UPDATES, STEPS = 2, 6


def test_metrics_have_a_line_for_each_step_and_one_from_before(whole):
    lines = whole.metrics
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    costs = {"cost/updates", "cost/rollouts", "cost/response_tokens"}
    validation = {"val/accuracy", "val/response_tokens", "val/truncated", "val/reward_accuracy", "val/reward_format"}
    assert set(lines[0]) == {"step", *validation, *costs}
    groups = {"train/reward", "train/grad_norm", "train/lr", "rollout/logp_gap_mean", "rollout/response_tokens"}
    groups |= {"policy/entropy", "policy/clip_fraction", "policy/kl", "policy/shaping", "policy/log_ratio_capped"}
    groups |= {"train/correct", "reward/accuracy", "reward/format", "reward/timeouts", "reward/errors"}
    groups |= {
        *costs,
        "tracker/brier",
        "tracker/bins",
        "tracker/baseline_mean",
        "tracker/value_mean",
        "tracker/rho_mean",
        "tracker/drift_mean",
    }
    for line in lines[1:]:
        assert groups <= set(line)
        assert all(np.isfinite(value).all() for value in line.values())
    assert [line["step"] for line in lines if "val/accuracy" in line] == [0, 3, 6]
    assert {line["policy/log_ratio_capped"] for line in lines[1:]} == {0}


def test_the_run_learns_from_rewards(whole):
    assert 0 < sum(line["train/reward"] for line in whole.metrics[1:]) < STEPS
    assert all(line["train/grad_norm"] > 0 for line in whole.metrics[1:])


def test_the_learning_rate_is_the_configured_one_from_the_first_step(whole):
    assert [line["train/lr"] for line in whole.metrics[1:]] == [1e-3] * STEPS


def test_rollout_and_trainer_agree_on_log_probs(whole):
    assert all(line["rollout/logp_gap_mean"] < 1e-3 for line in whole.metrics[1:])
    assert all(line["rollout/logp_gap_max"] < 1e-2 for line in whole.metrics[1:])


def test_grading_is_timed(whole):
    lines = [json.loads(line) for line in (whole.path / "metrics.jsonl").read_text().splitlines()[1:]]
    assert all(
        line["perf/grading_seconds"] > 0 and line["reward/timeouts"] == line["reward/errors"] == 0 for line in lines
    )


def test_the_reward_is_the_weighted_sum_of_its_parts(whole):
    for line in whole.metrics[1:]:
        assert line["reward/accuracy"] == pytest.approx(line["train/correct"])
        assert line["train/reward"] == pytest.approx(0.5 * line["reward/accuracy"] + 0.5 * line["reward/format"])
    for record in whole.rollouts(STEPS):
        assert record["reward"] == 0.5 * record["parts"]["accuracy"] + 0.5 * record["parts"]["format"]
        assert record["correct"] == record["parts"]["accuracy"]


def test_progress_is_shown(whole):
    assert re.search(r"step 6/6 .*reward \d\.\d\d .*val \d\.\d\d .*gap .*tok/s", whole.out)


def test_what_runs_before_the_first_step_is_said(whole, warm):
    settings = yaml.safe_load((whole.path / "config.yaml").read_text())
    model, train, val = settings["model"]["path"], settings["data"]["train"], settings["data"]["val"]
    before = [line for line in whole.out.splitlines() if not line.startswith("step ")]
    expected = [
        f"mssr: training {model}; output in {whole.path}",
        f"mssr: loading {model}",
        f"mssr: checking the rows of {train}",
        f"mssr: checking the rows of {val}",
        f"mssr: validation on {val}",
    ]
    assert before[: len(expected)] == expected
    assert whole.out.splitlines()[len(expected)].startswith("step 1/6 ")


def test_a_finished_run_says_what_it_reached_and_where_things_are(whole, warm):
    first, last = whole.metrics[0]["val/accuracy"], whole.metrics[-1]["val/accuracy"]
    page = whole.path / "rollouts" / f"step_{STEPS:06d}" / "index.html"
    best = max(whole.metrics, key=lambda line: line.get("val/accuracy", -1))
    summary = json.loads((whole.path / "summary.json").read_text())
    cost = summary["cost"]
    assert whole.out.splitlines()[-8:] == [
        f"mssr: saving {whole.path}/model",
        f"validation accuracy {first:.1%} before RL, {last:.1%} after ({100 * (last - first):+.1f} points); "
        f"best {best['val/accuracy']:.1%}, step {best['step']}",
        f"cost       6 steps, 12 updates, 96 rollouts, {cost['response_tokens']:,} tokens, "
        f"{timedelta(seconds=round(cost['seconds']))} of training, at most {summary['peak_memory_gib']:.1f} GiB per rank",
        f"curves     {whole.path}/curves.png, {whole.path}/tensorboard",
        f"rollouts   {page}   (open it in a browser)",
        f"model      {whole.path}/model",
        f"card       {whole.path}/README.md",
        f"summary    {whole.path}/summary.json",
    ]
    assert cost["response_tokens"] == whole.metrics[-1]["cost/response_tokens"]
    assert summary["command"] == f"mssr train {warm} run_dir={whole.path}"
    assert summary["versions"]["torch"] == torch.__version__ and summary["ranks"] == 1
    best_checkpoint = {"best_checkpoint"} if best["step"] in (4, 6) else set()  # two are kept
    assert summary["places"].keys() == {
        "metrics", "curves", "tensorboard", "rollouts", "checkpoint", "model", "card", "summary",
    } | best_checkpoint  # fmt: skip
    assert all(Path(place).exists() for place in summary["places"].values())


def test_the_card_is_in_both_folders_and_its_code_runs(whole, capsys):
    text = (whole.path / "README.md").read_text()
    card = ModelCard(text)
    assert (whole.path / "model" / "README.md").read_text() == text
    assert (whole.path / "model" / "curves.png").read_bytes() == (whole.path / "curves.png").read_bytes()
    assert "![training curves](curves.png)" in text and "base_model:" not in text  # a folder is no name of the hub
    assert card.data.pipeline_tag == "image-text-to-text" and card.data.tags == ["mssr", "reinforcement-learning"]
    (result,) = card.data.eval_results
    assert result.metric_value == round(100 * whole.metrics[-1]["val/accuracy"], 2)
    (settings,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    shown, run = yaml.safe_load(settings), yaml.safe_load((whole.path / "config.yaml").read_text())
    assert shown["train"]["optimizer"] == {"lr": 0.001} and "betas" in run["train"]["optimizer"]
    run_code(text, whole)
    assert capsys.readouterr().out.strip()


def run_code(card, run):
    """Run what a card says about loading the model."""
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    picture = next((run.path / "rollouts").rglob("*.png"))
    names = {}
    exec(code.replace("picture.png", str(picture)), names)
    return names


def test_an_adapter_has_a_card_of_its_own(mssr, warm, run):
    settings = ["model.lora.rank=4", "train.steps=1", "algorithm.old_logp=recompute"]
    mssr("train", warm, run.override, *settings).check()
    text = (run.path / "adapter" / "README.md").read_text()
    assert ModelCard(text).data.library_name == "peft"
    assert ModelCard((run.path / "model" / "README.md").read_text()).data.library_name == "transformers"
    loaded = run_code(text, run)["model"]
    assert isinstance(loaded, PeftModel) and loaded.peft_config["default"].r == 4


def test_rollouts_are_saved_with_their_images(whole):
    rollouts = whole.rollouts(STEPS)
    assert len(rollouts) == 16
    for record in rollouts:
        folder = whole.path / "rollouts" / f"step_{STEPS:06d}"
        assert Image.open(folder / record["images"][0]).size == (112, 56)
        assert record["reward"] in (0.0, 0.5, 1.0) and record["answer"] and record["problem"]


def test_tensorboard_files_are_written(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(whole.path / "tensorboard"))
    board.Reload()
    rewards = [event.value for event in board.Scalars("train/reward")]
    assert rewards == pytest.approx([line["train/reward"] for line in whole.metrics[1:]])


def test_old_checkpoints_are_removed(whole):
    assert whole.checkpoints == ["step_000004", "step_000006"]


def test_plain_transformers_loads_the_model(whole, warm):
    model, loading = AutoModelForImageTextToText.from_pretrained(whole.path / "model", output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before = AutoModelForImageTextToText.from_pretrained(warm.parent / "sft" / "model").state_dict()
    changed = [name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])]
    assert any("visual" in name for name in changed) and any("lm_head" in name for name in changed)
    assert AutoTokenizer.from_pretrained(whole.path / "model").chat_template
    processor = AutoImageProcessor.from_pretrained(whole.path / "model", backend="pil")
    assert processor.merge_size == 2
    assert (processor.size["shortest_edge"], processor.size["longest_edge"]) == (3136, 12_544)  # the run's limits


def test_eval_of_the_saved_model_is_the_last_validation(whole, mssr, warm):
    shown = mssr("eval", warm, f"model.path={whole.path / 'model'}").check().out
    assert shown.startswith(f"mssr: evaluating {whole.path / 'model'}\nmssr: loading ")
    assert shown.splitlines()[-1].startswith(f"accuracy {whole.metrics[-1]['val/accuracy']:.1%} on 32 problems")


def test_eval_of_several_samples_says_so(mssr, warm):
    shown = mssr("eval", warm, "eval.samples=2", "eval.temperature=0.6", "eval.max_problems=9").check().out
    assert " on 9 problems of " in shown and " (mean over 2 responses each, " in shown.splitlines()[-1]


def test_plot_draws_the_curves(whole, mssr, tmp_path):
    out = tmp_path / "curves.png"
    assert mssr("plot", whole.path, "--out", out).check().out.strip() == str(out)
    assert Image.open(out).size[0] > 300


def test_steps_with_a_gap_beyond_the_limit_are_left_out_and_end_the_run(mssr, warm, run):
    ended = mssr("train", warm, run.override, "rollout.max_gap=1e-12", "train.max_skipped_steps=2", "eval.every=9")
    line = ended.divergence
    assert "step 3" in line and "rollout.max_gap" in line and "after 2 skipped steps" in line
    assert (run.path / "curves.png").is_file() and not (run.path / "summary.json").exists()  # it did not reach its end
    assert "step 1: skipped: rollout and trainer disagree" in ended.out
    assert [line["train/skipped_steps"] for line in run.metrics[1:]] == [1, 2, 3]
    assert all(line["rollout/logp_gap_mean"] > 1e-12 for line in run.metrics[1:])


def test_a_step_that_is_left_out_changes_nothing(mssr, warm, run):
    """Neither weights nor schedule nor tracker: after two skipped steps, the checkpoint equals the start."""
    settings = [
        "rollout.max_gap=1e-12",
        "train.steps=2",
        "algorithm.tracker.n_init=1",
        "train.optimizer.schedule=cosine",
    ]
    out = mssr("train", warm, run.override, *settings).check().out
    assert "mssr: first rollouts of the value tracker\n" in out
    state = torch.load(run.path / "checkpoints" / "step_000002" / "state.pt", weights_only=True)
    assert state["engine"]["updates"] == 0
    assert set(state["tracker"]["beta"].sum(1).tolist()) == {8.0}  # N0: nothing was learned or forgotten
    start = load_file(Path(yaml.safe_load(warm.read_text())["model"]["path"]) / "model.safetensors")
    assert all(torch.equal(weight, start[name]) for name, weight in run.weights.items())
    assert (
        len({line["tracker/baseline_mean"] for line in run.metrics[1:]}) == 2
    )  # the prompts differ, and have their initial values


def test_a_policy_that_became_nan_ends_the_run_in_one_line(mssr, warm, run):
    line = mssr("train", warm, run.override, "train.optimizer.lr=1e30", "train.optimizer.grad_clip=1e30").divergence
    assert "became NaN" in line and "train.optimizer.lr" in line
    assert run.metrics[-1]["step"] == 2 and math.isnan(run.metrics[-1]["rollout/logp_gap_mean"])
