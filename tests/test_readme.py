"""The examples in the READMEs run unchanged, and the first table has the numbers of the committed results."""

import json
import re
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from mssr.rewards.row import Row

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
# Row of the first table -> the benchmark's providers, with and without gradients.
ROWS = {
    "eager PyTorch": ("eager", "eager"),
    "torch.compile": ("torch.compile", "torch.compile"),
    "Liger GRPO loss (no entropy)": ("liger GRPO", None),
    "Liger cross-entropy (no policy loss)": ("liger CE", None),
    "**mssr `exact`** (default)": ("mssr exact", "mssr forward"),
    "**mssr `recompute`** (for any loss)": ("mssr recompute", "mssr forward"),
}


def test_the_first_table_is_what_was_measured():
    report = json.loads((ROOT / "bench/results/nvidia-h200_2026-11-27/gpu_1.json").read_text())
    cases = {case["task"]: case for case in report["measurements"] if case["rows"] == "realistic"}
    shape = {key: cases["loss"][key] for key in ("model", "n", "d", "v", "dtype")}
    assert shape == {"model": "qwen2.5-vl-7b", "n": 8192, "d": 3584, "v": 152064, "dtype": "bfloat16"}
    lines = re.findall(r"^\| (.*) \|$", README.read_text(), re.MULTILINE)[:8]
    cells = {row: rest for row, *rest in (re.split(r" ?\| ?", line) for line in lines) if row in ROWS}
    assert list(cells) == list(ROWS)
    for row, (with_gradient, without) in ROWS.items():
        loss = cases["loss"]["providers"][with_gradient]
        forward = cases["forward"]["providers"][without] if without else None
        expected = [cost(loss), cost(forward) if forward else "", nats(loss["errors"].get("logp"))]
        assert cells[row] == expected, row


def cost(found: dict) -> str:
    mib = found["peak_extra_mib"]
    memory = f"{mib / 1024:.1f} GiB" if mib >= 1000 else f"{mib:.0f} MiB"
    return f"{1e3 * found['seconds']:.1f} ms, {memory}"


def nats(error: float | None) -> str:
    if error is None:
        return ""
    return f"{error:.2f}" if error > 0.01 else f"{error:.0e}".replace("e-0", "e-")


def test_the_fused_loss_in_five_lines():
    """It computes the plain clipped loss, with no additional terms."""
    example = python_block("linear_policy_loss")
    assert len(example.strip().splitlines()) - example.count("\n\n") == 5
    config = Qwen2Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    input_ids = torch.randint(97, (3, 12))
    with torch.no_grad():
        logits = model(input_ids).logits[:, :-1].flatten(0, 1)
        logp = torch.log_softmax(logits, -1).gather(-1, input_ids[:, 1:].reshape(-1, 1)).squeeze(-1)
    advantage, old_logp = torch.randn(33), logp - 0.5 * torch.randn(33)
    response_mask = (torch.arange(12) >= 4).expand(3, -1)
    names = {"model": model, "input_ids": input_ids, "response_mask": response_mask}
    names |= {"advantage": advantage, "old_logp": old_logp}
    exec(example, names)

    out, counted = names["out"], response_mask[:, 1:].flatten()
    torch.testing.assert_close(out.logp[counted], logp[counted])
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(out.entropy[counted], entropy[counted])
    ratio = torch.exp(logp - old_logp)
    clipped = ratio.clamp(0.8, 1.2)
    assert not clipped.equal(ratio)
    torch.testing.assert_close(out.loss, -torch.minimum(ratio * advantage, clipped * advantage)[counted].mean())
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_kernels_own_readme():
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "kernels/README.md").read_text(), re.DOTALL)
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.lm_head = torch.nn.Linear(32, 97, bias=False)
    hidden, target = torch.randn(12, 32), torch.randint(97, (12,))
    with torch.no_grad():
        expected = torch.log_softmax(model.lm_head(hidden), -1)
    names = {"model": model, "hidden": hidden, "target": target, "advantage": torch.randn(12)}
    exec(example, names | {"old_logp": expected.gather(1, target[:, None])[:, 0]}, names)
    torch.testing.assert_close(names["logp"], expected.gather(1, target[:, None])[:, 0])
    torch.testing.assert_close(names["entropy"], -(expected.exp() * expected).sum(1))
    assert names["result"].metrics.rows == 12 and model.lm_head.weight.grad is not None


def test_the_reward_of_the_readme():
    names = {}
    exec(python_block("def score"), names)
    row = Row("How many?", "12", tokens=5, max_tokens=20)
    assert names["score"]("It is twelve. Answer: 12", row) == {"accuracy": 1.0, "brevity": 0.1 * 0.75}
    assert names["score"]("Answer: 13", row) == {"accuracy": 0.0, "brevity": 0.0}


def python_block(content: str) -> str:
    (block,) = (one for one in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if content in one)
    return block
