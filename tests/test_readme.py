"""The examples of the READMEs are run as they stand."""

import re
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def test_the_fused_loss_in_five_lines():
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
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
        logits = model(input_ids).logits[:, :-1]
        logp = torch.log_softmax(logits, -1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    advantage, old_logp = torch.randn(3, 11), logp.clone()
    names = {"model": model, "input_ids": input_ids, "advantage": advantage, "old_logp": old_logp}
    exec(example, names)

    out = names["out"]
    torch.testing.assert_close(out.logp.view(3, 11), logp)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(out.entropy.view(3, 11), entropy)
    shaped = advantage + torch.minimum(0.4 * entropy, advantage.abs() / 2)
    torch.testing.assert_close(out.loss, -shaped.mean())
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids).logits[:, :-1], logits)


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
