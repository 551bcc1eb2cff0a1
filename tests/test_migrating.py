"""docs/MIGRATING.md: whoever comes from EasyR1, verl or TRL finds each of their keys, and the adapters work as printed."""

import re
import sys
from pathlib import Path

import pytest

from mssr.config.nearest import FOREIGN
from mssr.rewards.row import Row

PAGE = (Path(__file__).parent.parent / "docs/MIGRATING.md").read_text()
ROWS = [(left, right) for left, right in re.findall(r"^\| (.+?) \| (.+) \|$", PAGE, re.MULTILINE)]

# Sections of EasyR1's examples/config.yaml and of its dataclasses DataConfig, RewardConfig and TrainerConfig.
EASYR1 = """
data.train_files data.val_files data.prompt_key data.answer_key data.image_key data.video_key data.image_dir data.video_fps
data.max_prompt_length data.max_response_length data.rollout_batch_size data.mini_rollout_batch_size data.val_batch_size
data.format_prompt data.override_chat_template data.shuffle data.seed data.min_pixels data.max_pixels
data.filter_overlong_prompts data.filter_overlong_prompts_workers
worker.reward.reward_function worker.reward.reward_function_kwargs worker.reward.skip_special_tokens worker.reward.num_cpus
trainer.total_epochs trainer.max_steps trainer.project_name trainer.experiment_name trainer.logger trainer.nnodes
trainer.n_gpus_per_node trainer.max_try_make_batch trainer.val_freq trainer.val_before_train trainer.val_only
trainer.val_generations_to_log trainer.save_freq trainer.save_limit trainer.save_model_only trainer.save_checkpoint_path
trainer.load_checkpoint_path trainer.find_last_checkpoint
"""


@pytest.mark.parametrize("key", EASYR1.split())
def test_each_key_of_easyr1_has_a_row(key):
    assert any(f"`{key}`" in left for left, _ in ROWS)


@pytest.mark.parametrize(("theirs", "ours"), sorted(FOREIGN.items()))
def test_the_page_and_the_error_for_an_unknown_key_name_the_same(theirs, ours):
    rows = [right for left, right in ROWS if re.search(rf"(?<![\w]){theirs}(?!\w)", left)]
    assert not rows or any(ours in right for right in rows)


EASYR1_REWARD = """
def compute_score(reward_inputs):
    right = [float(each["ground_truth"] in each["response"]) for each in reward_inputs]
    short = [float(each["response_length"] < 5) for each in reward_inputs]
    return [{"overall": 0.9 * r + 0.1 * s, "accuracy": r, "format": s} for r, s in zip(right, short)]
"""
VERL_REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    assert data_source == "shapes" and extra_info["index"] == 3
    return {"score": float(solution_str == ground_truth), "pred": solution_str}
"""
TRL_REWARD = """
def accuracy_reward(prompts, completions, solution, level, **kwargs):
    assert prompts == ["<user>How many?", "<user>How many?"] and level == [1, 1]
    return [float(completion == answer) for completion, answer in zip(completions, solution)]
"""
BATCHED = [{"accuracy": 1.0, "format": 1.0}, {"accuracy": 0.0, "format": 0.0}]


@pytest.mark.parametrize(
    ("place", "file", "theirs", "expected"),
    [
        (0, "my_easyr1_reward", EASYR1_REWARD, BATCHED),
        (1, "my_verl_reward", VERL_REWARD, [1.0, 0.0]),
        (2, "my_trl_reward", TRL_REWARD, [1.0, 0.0]),
    ],
)
def test_the_adapters_give_what_the_other_trainer_would(place, file, theirs, expected, tmp_path, monkeypatch):
    adapter = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[place]
    (tmp_path / f"{file}.py").write_text(theirs)
    monkeypatch.syspath_prepend(tmp_path)
    names = {}
    exec(adapter, names)
    columns = [{"level": 1, "data_source": "shapes", "extra_info": {"index": 3}}] * 2
    if place == 2:
        columns = [{"level": 1}] * 2
    rows = [
        Row("How many?", "12", prompt="<user>How many?", tokens=tokens, columns=each)
        for tokens, each in zip((2, 9), columns)
    ]
    responses = ["12", "13"]
    batched = names["reward"].__code__.co_varnames[0] == "responses"
    found = names["reward"](responses, rows) if batched else [names["reward"](*pair) for pair in zip(responses, rows)]
    assert found == expected
    del sys.modules[file]
