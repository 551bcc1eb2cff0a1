"""What a run says about itself at its end, from its metrics and its folder."""

import json
import math
import re
from pathlib import Path

import pytest
from PIL import Image

from mssr.config import load_config
from mssr.data.prompts import PromptEncoder, load_processors
from mssr.training.card import model_card
from mssr.training.summary import command_line, place_lines, places, summarise, write_summary

CONFIG = load_config({"run_dir": "runs/mine", "model": {"path": "base"}, "data": {"train": "x"}, "seed": 7})


def summary(*accuracies, **values):
    """Of one line per step, each with these values; an accuracy of None: no validation."""
    lines = [
        {"step": step} | values | ({} if one is None else {"val/accuracy": one}) for step, one in enumerate(accuracies)
    ]
    return summarise(CONFIG, lines)


def test_before_after_and_best():
    found = summary(0.25, None, 0.75, None, 0.75, 0.5)
    assert (found.val_accuracy_before, found.val_accuracy_after, found.steps) == (0.25, 0.5, 5)
    assert (found.val_accuracy_best, found.best_step) == (0.75, 2)  # the earliest of the best
    line = "validation accuracy 25.0% before RL, 50.0% after (+25.0 points); best 75.0%, step 2"
    assert str(found).splitlines()[0] == line


@pytest.mark.parametrize("accuracies", [(None, None), (0.5, None)])
def test_without_a_validation_after_training_there_is_no_line_on_accuracy(accuracies):
    found = summary(*accuracies)
    assert found.val_accuracy_after is None and "accuracy" not in str(found)
    assert found.val_accuracy_before == accuracies[0]


def test_a_run_that_became_worse_says_so():
    found = summary(0.5, 0.25)
    assert (found.best_step, found.val_accuracy_best) == (0, 0.5) and "(-25.0 points); best 50.0%, step 0" in str(found)


def test_costs_gap_and_memory_are_of_the_whole_run():
    costs = [{"cost/updates": 0, "cost/seconds": 2.0}, {"cost/updates": 4, "cost/seconds": 3723.44}]
    gaps = [{}, {"rollout/logp_gap_mean": 0.1, "rollout/logp_gap_max": 3.0}]
    memory = [{"memory/sync_gib": 9.0}, {"memory/rollout_gib": 2.0}]
    lines = [{"step": step} | costs[step] | gaps[step] | memory[step] for step in (0, 1)]
    broken = {"step": 2, "rollout/logp_gap_mean": math.nan, "rollout/logp_gap_max": math.nan, "train/skipped_steps": 1}
    found = summarise(CONFIG, [*lines, broken])
    assert found.cost == {"updates": 4, "seconds": 3723.4} and found.peak_memory_gib == 9.0 and found.skipped_steps == 1
    assert found.logp_gap == {"mean": 0.1, "max": 3.0}
    assert "cost       2 steps, 4 updates, 1:02:03 of training, at most 9.0 GiB per rank" in str(found)


def test_only_what_is_there_is_named(tmp_path):
    assert places(tmp_path) == {} and place_lines({}) == []
    for step in (40, 1_000_000, 80):
        folder = tmp_path / "rollouts" / f"step_{step:06d}"
        folder.mkdir(parents=True)
        (folder / "index.html").touch()
        (tmp_path / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "model").mkdir()
    write_summary(tmp_path, {"steps": 3})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"steps": 3}
    found = places(tmp_path, best_step=80)
    assert found["checkpoint"] == f"{tmp_path}/checkpoints/step_1000000"
    assert found["best_checkpoint"] == f"{tmp_path}/checkpoints/step_000080"
    assert "best_checkpoint" not in places(tmp_path, best_step=60)  # it was not kept
    assert place_lines(found) == [
        f"curves     {tmp_path}/tensorboard",
        f"rollouts   {tmp_path}/rollouts/step_1000000/index.html   (open it in a browser)",
        f"model      {tmp_path}/model",
        f"summary    {tmp_path}/summary.json",
    ]
    (tmp_path / "curves.png").touch()
    first, second, *_ = place_lines({"wandb": "https://there"} | places(tmp_path))
    assert first == f"curves     {tmp_path}/curves.png, {tmp_path}/tensorboard"
    assert second.startswith("rollouts ") and "wandb      https://there" in place_lines({"wandb": "https://there"})


@pytest.mark.parametrize(
    "argv, ranks, line",
    [
        (["/bin/mssr", "train", "my.yaml", "--resume", "seed=1"], {}, "mssr train my.yaml seed=1"),
        (["/lib/mssr/__main__.py", "train", "a b.yaml"], {}, "mssr train 'a b.yaml'"),
        (
            ["/bin/mssr", "train", "my.yaml"],
            {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"},
            "python -m mssr.launch --nnodes 2 --nproc-per-node 8 -m mssr train my.yaml",
        ),
        (["sweep.py", "3"], {}, "python sweep.py 3"),
        (["-c"], {}, "mssr.train(config), in Python"),
        (["/lib/ipykernel_launcher.py", "-f", "kernel.json"], {}, "mssr.train(config), in Python"),
    ],
)
def test_the_command_is_what_one_types_again(monkeypatch, argv, ranks, line):
    monkeypatch.setattr("sys.argv", argv)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    assert command_line() == line


@pytest.mark.parametrize(
    "data", [{"instruction": None}, {"instruction": "Box the answer.", "system_prompt": "Count {well}.\nBe 'brief'."}]
)
def test_the_code_in_the_card_makes_the_prompt_of_the_training(material, tmp_path, monkeypatch, data):
    """Without an instruction of its own a plain problem gets the default one."""
    config = load_config(material / "config.yaml", [f"data.{key}={json.dumps(value)}" for key, value in data.items()])
    card = model_card(config, [], summarise(config, []), name="mine", path=config.model.path)
    (code,) = re.findall(r"```python\n(.*?)with torch", card, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (112, 112), "white").save("picture.png")
    exec(code.replace('question = "..."', 'question = "How many?"'), names := {})
    encoder = PromptEncoder(*load_processors(config.model.path), config.data)
    image = {"bytes": Path("picture.png").read_bytes()}
    prompt = encoder.encode({"problem": "<image>How many?", "answer": "3", "images": [image]}, 0, "x")
    made = encoder.tokenizer.decode(names["inputs"]["input_ids"][0])
    assert re.sub("(<.image_pad.>)+", "<image>", made) == re.sub("(<.image_pad.>)+", "<image>", prompt.rendered)
