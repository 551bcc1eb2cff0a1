"""MSSR in TRL: one generation per prompt, a value tracker instead of a group (arXiv 2512.18215).

    python examples/trl_mssr.py

To convert a GRPOTrainer script, use MSSRTrainer and MSSRConfig instead; rewards must be in [0, 1].
"""

import tempfile
from pathlib import Path

import mssr.extras  # noqa: F401  first: it says in one line which library is missing  # isort: skip
from datasets import Dataset
from tiny.model import write_tiny_model
from transformers import PrinterCallback

from mssr.integrations.trl.single_rollout import MSSRConfig, MSSRTrainer


def reward(completions, **_) -> list[float]:
    """The share of digits in the answer."""
    texts = [completion[0]["content"] for completion in completions]
    return [sum(letter.isdigit() for letter in text) / max(len(text), 1) for text in texts]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        corpus = [f"{a} + {b} = {a + b}" for a in range(10) for b in range(10)]
        model = write_tiny_model(Path(folder) / "model", corpus, family="qwen2", hidden=64, vocabulary=300)
        # The tracker recognises a prompt by its `id`, or without one by its content.
        rows = [{"id": a, "prompt": [{"role": "user", "content": f"{a} + {a} ="}]} for a in range(16)]
        config = MSSRConfig(
            output_dir=str(Path(folder) / "run"),
            per_device_train_batch_size=8,
            steps_per_generation=2,  # two updates on 16 responses to 16 prompts
            max_completion_length=8,
            max_steps=24,
            learning_rate=3e-3,
            entropy_alpha=0.4,
            entropy_kappa=2.0,
            logging_steps=4,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
        )
        trainer = MSSRTrainer(str(model), reward_funcs=reward, args=config, train_dataset=Dataset.from_list(rows))
        trainer.remove_callback(PrinterCallback)  # the table below shows its values
        trainer.train()
    print(f"{'step':>4} {'reward':>8} {'tracker':>8} {'rho':>8} {'entropy':>8} {'shaping':>8}")
    for step in trainer.state.log_history:
        if "reward" in step:
            names = ("reward", "tracker/value_mean", "tracker/rho", "entropy", "shaping/mean")
            print(f"{step['step']:>4} " + " ".join(f"{step[name]:>8.3f}" for name in names))


if __name__ == "__main__":
    main()
