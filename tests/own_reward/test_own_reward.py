"""examples/own_reward as its README says it: the reward, the ten lines, and the commands, which train."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from examples.own_reward.reward import counting
from mssr.observe.metrics import read_metrics
from mssr.rewards.row import Row

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/own_reward"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)```", (EXAMPLE / "README.md").read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(
    ("response", "tokens", "expected"),
    [
        ("Answer: 2", 8, {"accuracy": 1, "brevity": 0.75}),
        ("red square 1, nothing 1, red square 2, blue circle 2. Answer: 2\n", 24, {"accuracy": 1, "brevity": 0.25}),
        ("Answer: 3. Answer: 2", 32, {"accuracy": 1, "brevity": 0}),
        ("Answer: 2. Answer: 3", 8, {"accuracy": 0, "brevity": 0}),
        ("Answer: 12", 8, {"accuracy": 0, "brevity": 0}),
        ("Answer: 2 squares", 8, {"accuracy": 0, "brevity": 0}),
        ("2", 1, {"accuracy": 0, "brevity": 0}),
    ],
)
def test_the_reward(response, tokens, expected):
    assert counting(response, Row(problem="?", answer="2", tokens=tokens, max_tokens=32)) == expected


def test_the_readme_shows_the_ten_lines_and_the_reward_as_they_are():
    (ten,), (reward,) = blocks("yaml"), blocks("python")
    assert len(ten.splitlines()) == 10
    config = yaml.safe_load((EXAMPLE / "config.yaml").read_text())
    for section, keys in yaml.safe_load(ten).items():
        assert keys.items() <= config[section].items(), section
    without_docstring = re.sub(r'( *""".*?"""\n+)', "", (EXAMPLE / "reward.py").read_text(), flags=re.DOTALL)
    assert reward.strip() == without_docstring.strip()


@pytest.mark.slow("100 s: the README's commands in a new folder, and that RL on a user's own reward learns")
def test_the_commands_of_the_readme_train(tmp_path):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    commands, *_ = blocks("")
    for line in commands.splitlines():
        program, *arguments = shlex.split(line, comments=True)
        python = {".venv/bin/python": [], ".venv/bin/mssr": ["-m", "mssr"]}[program]
        ended = subprocess.run(
            [sys.executable, *python, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=400,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr[-3000:]
        if "show" in arguments:
            assert "How many" in ended.stdout and "Answer: N" in ended.stdout and "tokens" in ended.stdout
    records = read_metrics(tmp_path / "runs/own_reward/metrics.jsonl")
    accuracy = [record["val/accuracy"] for record in records if "val/accuracy" in record]
    assert accuracy[0] > 0.4 and accuracy[-1] >= accuracy[0] + 0.15
    last = records[-1]
    assert last["reward/timeouts"] == last["reward/errors"] == 0
    assert 0 < last["reward/brevity"] < last["reward/accuracy"] == pytest.approx(last["train/correct"])
    weighted = last["reward/accuracy"] + 0.1 * last["reward/brevity"]
    assert last["train/reward"] == pytest.approx(weighted)
