# %% [markdown]
# The trainer from Python, as a script or in the cells of a notebook: `python examples/python_interface.py`
#
# A tiny text model with random weights learns to answer with digits: a reward given as a function, a callback that watches
# the steps and ends the run, and the summary. For a model that reads pictures, give the rows an `images` column.

# %%
import mssr.extras  # noqa: F401  first: it says in one line which library is missing  # isort: skip
from mssr import load_config, train  # before torch: it sets one thread per process  # isort: skip
import json
import tempfile
from pathlib import Path

from tiny.model import write_tiny_model

folder = Path(tempfile.mkdtemp())
rows = [{"problem": f"{a} + {b} =", "answer": str(a + b)} for a in range(8) for b in range(8)]
(folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
model = write_tiny_model(folder / "base", [row["problem"] for row in rows], family="qwen2", hidden=64, vocabulary=300)

# %%
config = load_config(
    {
        "run_dir": folder / "run",
        "device": "cpu",
        "model": {"path": model},
        "data": {"train": str(folder / "train.jsonl"), "instruction": ""},
        "algorithm": {"kl_coef": 0.0, "tracker": {"n_init": 0}},
        "rollout": {"engine": "hf", "prompts_per_step": 32, "max_response_tokens": 8},
        "train": {"steps": 40, "responses_per_update": 32, "optimizer": {"lr": 3e-3}},
    },
    ["seed=1"],
)


# %%
def digits(response, row):
    """The share of digits in the response; `row` has the problem, the answer and every other column."""
    return sum(letter.isdigit() for letter in response) / max(len(response), 1)


rewards = []


def on_step(step, metrics):
    """Return False to end the run: here, when the last steps were good."""
    rewards.append(metrics["train/reward"])
    return not min(rewards[-3:]) > 0.9


summary = train(config, reward=digits, on_step=on_step)

# %%
print(summary)
print(f"reward {rewards[0]:.2f} in the first step, {rewards[-1]:.2f} in step {summary.steps}")
