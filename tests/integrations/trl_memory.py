"""Peak memory and time of TRL's loss, from the hidden states to the gradients, with TRL's head and with ours.

    python trl_memory.py [--dtype bfloat16 --sequences 4 --prompt 0 --completion 512 --d 1024 --v 65536 --repeats 0]

Both heads are called as in the trainers, `model(..., labels=labels, fused_lm_head=True)`, on a model whose backbone returns
given hidden states. Each runs in a process of its own; the peak is the resident set beyond the inputs.
"""

import argparse
import gc
import json
import multiprocessing
import time
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast
from trl.trainer.utils import add_fused_lm_head

from mssr.integrations.trl.fused_head import PolicyRows, fuse_head
from mssr_kernels import PolicyLossConfig

HEADS = ("trl", "mssr", "mssr loss")  # the last one computes the loss in the forward pass, as MSSRTrainer does


class GivenHidden(nn.Module):
    """A backbone that returns given hidden states, which are a leaf."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = nn.Parameter(hidden)
        self.embed_tokens = nn.Embedding(1, 1)  # without one, transformers does not find the head either

    def forward(self, **_):
        return BaseModelOutputWithPast(last_hidden_state=self.hidden)


def model_with(head: str, case: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = dict(vocab_size=case.v, hidden_size=case.d, intermediate_size=8, num_attention_heads=1)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=0))
    dtype = getattr(torch, case.dtype)
    length = case.prompt + case.completion + 1
    model.model = GivenHidden(torch.randn(case.sequences, length, case.d, dtype=dtype))
    model.lm_head = nn.Linear(case.d, case.v, bias=False, dtype=dtype)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    if head != "trl":
        fuse_head(model, temperature=1.0)
    return model


def forward_backward(model: LlamaForCausalLM, head: str, case: argparse.Namespace) -> float:
    """Compute an on-policy clipped loss and its gradients; return the seconds that it took."""
    generator = torch.Generator().manual_seed(1)
    shape = case.sequences, case.prompt + case.completion + 1
    labels = torch.randint(case.v, shape, generator=generator)
    labels[:, : case.prompt + 1] = -100
    advantage = torch.randn(case.sequences, 1, generator=generator).expand(-1, case.completion)
    model.model.hidden.grad = model.lm_head.weight.grad = None
    start = time.perf_counter()
    if head == "mssr loss":
        mask = torch.ones(advantage.shape, dtype=torch.bool)
        config = PolicyLossConfig(entropy_alpha=0.0)
        rows = PolicyRows(mask, normalizer=mask.sum(), config=config, advantage=advantage)
        loss = model(labels=labels, fused_lm_head=True, policy_rows=rows).loss
    else:
        logp = model(labels=labels, fused_lm_head=True).log_probs[:, -case.completion :]
        ratio = (logp - logp.detach()).exp()
        loss = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.3) * advantage).mean()
    loss.backward()
    return time.perf_counter() - start


def resident_mib(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}: memory can only be measured on Linux")


def measure(head: str, case: argparse.Namespace, pipe) -> None:
    torch.set_num_threads(case.threads)
    model = model_with(head, case)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present resident set
    before = resident_mib("VmRSS")
    forward_backward(model, head, case)
    found = {"peak_extra_mib": resident_mib("VmHWM") - before, "gradient_norm": float(model.lm_head.weight.grad.norm())}
    if case.repeats:
        found["seconds"] = [forward_backward(model, head, case) for _ in range(case.repeats)]
    pipe.send(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    for name, default in dict(sequences=4, prompt=0, completion=512, d=1024, v=65536, repeats=0, threads=1).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    case = parser.parse_args()
    context, results = multiprocessing.get_context("fork"), {}
    for head in HEADS:
        pipe, child = context.Pipe()
        process = context.Process(target=measure, args=(head, case, child))
        process.start()
        child.close()
        results[head] = pipe.recv()
        process.join()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
