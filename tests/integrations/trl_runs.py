"""Tiny runs of TRL's trainers, with TRL's head or with ours: the same model files, data and seed."""

import torch
from datasets import Dataset
from PIL import Image

from examples.tiny.model import write_tiny_model

SETTINGS = dict(
    per_device_train_batch_size=8,
    max_completion_length=8,
    learning_rate=1e-3,
    logging_steps=1,
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
)


# An untrained policy also generates image tokens, on which TRL 1.15 fails.
NO_IMAGES = dict(generation_kwargs={"suppress_tokens": [3, 4, 5, 6]})


def write_text_model(folder):
    corpus = [f"{a} + {b} = {a + b}" for a in range(10) for b in range(10)]
    return write_tiny_model(folder / "text", corpus, family="qwen2", hidden=64, vocabulary=300)


def write_image_model(folder):
    corpus = [f"How bright is {a}? {b}" for a in range(10) for b in range(10)]
    return write_tiny_model(folder / "images", corpus, hidden=64, vision_layers=1, vocabulary=300)


def text_rows(count: int = 16, **columns) -> Dataset:
    rows = [{"prompt": [{"role": "user", "content": f"{a} + {a // 3} ="}]} for a in range(count)]
    return Dataset.from_list(
        [row | {name: values[i] for name, values in columns.items()} for i, row in enumerate(rows)]
    )


def image_rows(count: int = 16) -> Dataset:
    """Return rows with one image each, in two sizes, so that images of a micro-batch differ in their number of patches."""
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"How bright is {a}?"}],
                "image": Image.new("RGB", (56, 28 + 28 * (a % 2)), (16 * a, 255 - 16 * a, 90)),
            }
            for a in range(count)
        ]
    )


def share_of_even_bytes(completions, **_) -> list[float]:
    """Return rewards in [0, 1] that differ between responses and that a policy can learn to raise."""
    texts = [completion[0]["content"].encode() for completion in completions]
    return [sum(byte % 2 == 0 for byte in text) / max(len(text), 1) for text in texts]


def trainer(kind, config, model, rows, folder, **options):
    """Return a trainer. kind, config: its class and its configuration's. options: keyword arguments of either."""
    own = {name: options.pop(name) for name in ("peft_config", "processing_class") if name in options}
    arguments = config(output_dir=str(folder), **SETTINGS | options)
    return kind(str(model), reward_funcs=share_of_even_bytes, args=arguments, train_dataset=rows, **own)


def train(*arguments, **options) -> list[dict[str, float]]:
    """Train, and return what TRL logged at each step."""
    run = trainer(*arguments, **options)
    run.train()
    return [step for step in run.state.log_history if "loss" in step]


def micro_batch() -> dict[str, torch.Tensor]:
    """Return off-policy inputs of `compute_loss` as TRL makes them: prompts padded left, responses padded right."""
    generator = torch.Generator().manual_seed(0)
    responses, prompt, longest = 4, 3, 6
    lengths = torch.tensor([6, 1, 4, 5])
    noise = torch.randn(2, responses, longest, generator=generator)
    return {
        "prompt_ids": torch.randint(10, 250, (responses, prompt), generator=generator),
        "prompt_mask": torch.tensor([[1, 1, 1], [0, 1, 1], [1, 1, 1], [0, 0, 1]]),
        "completion_ids": torch.randint(10, 250, (responses, longest), generator=generator),
        "completion_mask": (torch.arange(longest) < lengths[:, None]).long(),
        "advantages": torch.tensor([1.3, -0.7, 0.4, -1.1]),
        "num_items_in_batch": lengths.sum(),
        "old_per_token_logps": -5.4 + 0.4 * noise[0],
        "ref_per_token_logps": -5.4 + 0.4 * noise[1],
    }


def gradients(run, inputs) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss of a micro-batch, and its gradient by every parameter."""
    run.model.zero_grad()
    run.model.eval()  # in train mode TRL uses the accumulation steps, which only a run counts
    loss = run.compute_loss(run.model, inputs)
    loss.backward()
    return loss.item(), {name: value.grad for name, value in run.model.named_parameters() if value.grad is not None}
