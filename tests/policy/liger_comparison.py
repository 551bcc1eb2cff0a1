"""Compare the policy with liger's layers to plain transformers; print the differences as JSON. Run by test_liger_layers."""

import contextlib
import io
import json
import sys

import liger_kernel.ops.rms_norm as rms_norm
import numpy as np
import torch
import triton.language as tl
from option_helpers import LORA, disturb, options
from policy_helpers import model_dir, plain_logp, plain_model, prompts, random_batch
from triton.runtime import interpreter

from mssr.policy.export import adapter_weights
from mssr.policy.liger import replace_layers
from mssr.policy.loading import load_policy
from mssr.policy.lora import add_adapters


def interpret_as_compiled() -> None:
    """Add two things that Triton's interpreter lacks: float arguments as tensors, and libdevice."""
    convert = interpreter._implicit_cvt

    def with_floats(arg):
        if isinstance(arg, float):
            return tl.tensor(interpreter.TensorHandle(np.array([arg], np.float32), tl.float32), tl.float32)
        return convert(arg)

    interpreter._implicit_cvt = with_floats
    rms_norm.rsqrt = lambda value: tl.rsqrt(value)


def scored(model, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    logp = plain_logp(model, batch)[batch.mask]
    logp.sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return logp.detach(), gradients


def policy_of(lora):
    policy = load_policy(model_dir(), torch.float32, options(lora=lora))
    disturb(policy)
    return policy


def main() -> None:
    interpret_as_compiled()
    batch = random_batch([prompts()[1], prompts()[2]], [4, 3])
    kinds = {"whole": None, "lora": LORA}
    plain, merged = plain_model(model_dir()), policy_of(LORA)
    names = list(plain.state_dict())
    expected = {"whole": scored(plain, batch), "lora": scored(merged.model, batch)}

    result, said = {}, io.StringIO()
    for kind, lora in kinds.items():
        policy = policy_of(None)
        with contextlib.redirect_stdout(said):
            replace_layers(policy.model)
        if lora:
            add_adapters(policy, lora)
            disturb(policy)
            assert adapter_weights(policy).keys() == adapter_weights(merged).keys()
        else:
            result["names"] = list(policy.model.state_dict()) == names
        rotary = count_calls(policy.model)
        logp, gradients = scored(policy.model, batch)
        result[kind] = {
            "logp": float((logp - expected[kind][0]).abs().max()),
            "trained": len(expected[kind][1]),
            "gradients": {
                name: float((gradient - expected[kind][1][name]).abs().max() / expected[kind][1][name].abs().max())
                for name, gradient in gradients.items()
            },
        }
    result |= {
        "said": said.getvalue().splitlines(),
        "rotary_calls": len(rotary),
        "head": type(policy.model.lm_head).__name__,
        "forward": type(policy.model).forward.__module__ if "forward" not in vars(policy.model) else "patched",
    }
    print(json.dumps(result))


def count_calls(model) -> list:
    """Return a list that gets an entry at each call of liger's rotary function by the model's layers."""
    module, calls = sys.modules[type(model).__module__], []
    liger = module.apply_rotary_pos_emb
    assert liger.__module__.startswith("liger_kernel"), liger

    def counted(*args, **kwargs):
        calls.append(None)
        return liger(*args, **kwargs)

    counted.__module__ = liger.__module__
    module.apply_rotary_pos_emb = counted
    return calls


if __name__ == "__main__":
    main()
