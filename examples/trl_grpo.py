"""TRL's GRPOTrainer with its own language-model head and with ours: the same curves, without logits.

    python examples/trl_grpo.py

The change is one import: `from mssr.integrations.trl import FusedGRPOTrainer as GRPOTrainer`.
"""

import tempfile
from pathlib import Path

import mssr.extras  # noqa: F401  first: it says in one line which library is missing  # isort: skip
from datasets import Dataset
from tiny.model import write_tiny_model
from transformers import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from mssr.integrations.trl import FusedGRPOTrainer


def reward(completions, **_) -> list[float]:
    """The share of digits in the answer."""
    texts = [completion[0]["content"] for completion in completions]
    return [sum(letter.isdigit() for letter in text) / max(len(text), 1) for text in texts]


def train(trainer_class, model: Path, dataset: Dataset) -> list[dict[str, float]]:
    config = GRPOConfig(
        output_dir=str(model.parent / "run"),
        num_generations=4,
        per_device_train_batch_size=8,
        max_completion_length=8,
        max_steps=3,
        learning_rate=1e-3,
        beta=0.02,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
    )
    trainer = trainer_class(str(model), reward_funcs=reward, args=config, train_dataset=dataset)
    trainer.remove_callback(PrinterCallback)  # the table below shows its values
    trainer.train()
    return [step for step in trainer.state.log_history if "loss" in step]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        corpus = [f"{a} + {b} = {a + b}" for a in range(10) for b in range(10)]
        model = write_tiny_model(Path(folder) / "model", corpus, family="qwen2", hidden=64, vocabulary=300)
        dataset = Dataset.from_list([{"prompt": [{"role": "user", "content": f"{a} + {a} ="}]} for a in range(10)])
        stock, fused = (train(kind, model, dataset) for kind in (GRPOTrainer, FusedGRPOTrainer))
    print(f"{'step':>4} {'':>10} {'TRL':>12} {'fused':>12}")
    for step, (theirs, ours) in enumerate(zip(stock, fused), 1):
        for name in ("loss", "grad_norm", "entropy"):
            print(f"{step:>4} {name:>10} {theirs[name]:>12.6f} {ours[name]:>12.6f}")


if __name__ == "__main__":
    main()
