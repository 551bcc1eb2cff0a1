"""Data and a model small enough that a training step takes a tenth of a second."""

from pathlib import Path

import yaml

from examples.digits.problems import write_digits
from examples.digits.tiny_model import write_tiny_model
from mssr.data.files import open_rows

INSTRUCTION = "Box the answer."


def write_material(folder: Path) -> Path:
    files = write_digits(folder / "data", seed=0, train=64, val=32, test=1)
    rows = list(open_rows(str(files["train"])))
    texts = [text for row in rows for text in (row["problem"].removeprefix("<image>"), row["solution"])]
    write_tiny_model(folder / "untrained", [*texts, "user\n", "assistant\n", "\n" + INSTRUCTION], hidden=64)
    config = {
        "run_dir": str(folder / "run"),
        "device": "cpu",
        "model": {"path": str(folder / "untrained")},
        "data": {
            "train": str(files["train"]),
            "val": str(files["val"]),
            "instruction": INSTRUCTION,
            "max_prompt_tokens": 128,
            "min_pixels": 3136,
            "max_pixels": 12544,
        },
        # Half of the reward is for the format: after forty batches a policy gets rewards of 0, 0.5 and 1.
        "reward": {
            "function": {"accuracy": "math", "format": "format"},
            "weights": {"accuracy": 0.5, "format": 0.5},
            "workers": 1,
        },
        "algorithm": {"kl_coef": 0.0, "tracker": {"drift": "batch", "n_init": 0}},
        "rollout": {"engine": "hf", "prompts_per_step": 16, "max_response_tokens": 12},
        "train": {
            "steps": 6,
            "responses_per_update": 8,
            "micro_batch_tokens": 256,
            "zero_stage": 0,
            "checkpoint_every": 2,
            "optimizer": {"lr": 1e-3},
        },
        "sft": {
            "steps": 40,
            "batch_size": 32,
            "eval_every": 40,
            "optimizer": {"lr": 3e-3, "grad_clip": 0.5, "schedule": "constant"},
        },
        "eval": {"every": 3},
        "log": {"rollouts_every": 1, "rollouts_saved": 16},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder
