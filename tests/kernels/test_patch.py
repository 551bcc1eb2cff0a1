"""A patched model's log-probs and losses are those of its logits, and everything else about it is unchanged."""

import copy
import inspect
import json
import pickle
import warnings

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from patched_models import (
    FAMILIES,
    VOCAB,
    assert_same_gradients,
    batch,
    expected,
    gradients,
    tiny,
)
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from mssr_kernels import (
    FusedLMHead,
    LogprobEntropy,
    PolicyLoss,
    PolicyLossConfig,
    check_patch,
    next_token_target,
    patch,
    unpatch,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_entropies_and_gradients_are_those_of_the_logits(family):
    model = tiny(family)
    stock, (tokens, target) = copy.deepcopy(model), batch()
    assert patch(model) is model
    assert 0 <= check_patch(model, input_ids=tokens) < 1e-4
    upstream = torch.randn(2, *target.shape)
    out = model(tokens, target=target, temperature=0.7)
    logp, entropy = expected(stock, target, 0.7, input_ids=tokens)
    assert isinstance(out, LogprobEntropy) and out.logp.shape == target.shape
    torch.testing.assert_close(out.logp.double(), logp, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(out.entropy.double(), entropy, rtol=1e-5, atol=2e-5)
    assert not out.logp[target == -100].any() and out.logp[target != -100].std() > 0.02
    assert_same_gradients(
        gradients(model, (upstream[0] * out.logp + upstream[1] * out.entropy).sum()),
        gradients(stock, (upstream[0] * logp + upstream[1] * entropy).sum()),
    )


@pytest.mark.parametrize("family", ["qwen2 tied", "gemma2", "granite"])
def test_the_policy_loss(family):
    """The clipped loss equals eager code on the stock model's logits, with one temperature per position."""
    model = tiny(family)
    stock, (tokens, target) = copy.deepcopy(model), batch()
    patch(model)
    advantage, temperature = torch.randn(target.shape), 0.5 + torch.rand(target.shape)
    logp, _ = expected(stock, target, temperature[..., None].double(), input_ids=tokens)
    old_logp = (logp + 0.4 * torch.randn(target.shape)).float().detach()
    out = model(
        input_ids=tokens, target=target, advantage=advantage, old_logp=old_logp, temperature=temperature, normalizer=7.0,
        config=PolicyLossConfig(clip_low=0.2, clip_high=0.3, dual_clip=None, entropy_alpha=0.0),
    )  # fmt: skip
    ratio = torch.exp(logp - old_logp)
    objective = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.3) * advantage)
    loss = -objective[target != -100].sum() / 7
    assert isinstance(out, PolicyLoss)
    assert {field.shape for field in out[1:6]} == {target.shape}
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-5, atol=1e-6)
    assert out.metrics.rows == (target != -100).sum() and 0 < out.clipped.sum() < out.metrics.rows
    assert_same_gradients(gradients(model, out.loss), gradients(stock, loss))


@pytest.mark.parametrize("family", ["qwen2", "qwen2 tied", "gemma2", "granite"])
def test_without_target_nothing_is_new(family, tmp_path):
    model = tiny(family)
    tokens, target = batch()
    model.config.use_cache = True

    def behaviour(folder):
        model.save_pretrained(folder)
        out = model(tokens, labels=tokens, ignore_index=5)
        return {
            "logits": out.logits.tolist(),
            "loss": out.loss.item(),
            "cache": len(out.past_key_values),
            "generated": model.generate(tokens, max_new_tokens=5, do_sample=False).tolist(),
            "state": list(model.state_dict()),
            "signature": str(inspect.signature(model.forward)),
            "config": json.loads((folder / "config.json").read_text()),
            "files": sorted(path.name for path in folder.iterdir()),
            "weights": (folder / "model.safetensors").read_bytes(),
        }

    parameters = dict(model.named_parameters())
    before = behaviour(tmp_path / "stock")
    patch(model)
    model(tokens, target=target)
    assert behaviour(tmp_path / "patched") == before
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is bool(model.config.tie_word_embeddings)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "patched", attn_implementation="eager")
    assert type(loaded.lm_head) is nn.Linear and torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert unpatch(model) is model
    assert behaviour(tmp_path / "unpatched") == before
    assert type(model.lm_head) is nn.Linear and "forward" not in vars(model)


def test_a_deep_copy_is_a_model_of_its_own():
    """Reference models are made this way."""
    model, (tokens, target) = patch(tiny()), batch()
    reference = copy.deepcopy(model)
    before = reference(tokens, target=target).logp
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert torch.equal(reference(tokens, target=target).logp, before)
    assert not torch.allclose(model(tokens, target=target).logp, before)
    unpatch(reference)
    assert isinstance(model.lm_head, FusedLMHead) and type(reference.lm_head) is nn.Linear


def test_a_pickled_model_comes_back_unpatched():
    model, (tokens, target) = patch(tiny()), batch()
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert torch.equal(patch(loaded)(tokens, target=target).logp, model(tokens, target=target).logp)


@pytest.fixture
def accelerator():
    """An Accelerator with bfloat16 on the CPU. Its settings are global, so they are reset."""
    AcceleratorState._reset_state(True)
    yield Accelerator(mixed_precision="bf16", cpu=True)
    AcceleratorState._reset_state(True)


def test_accelerate(accelerator):
    """`prepare` wraps forward for autocast; `unwrap_model` removes that wrapper and nothing else."""
    model, (tokens, target) = patch(tiny()), batch()
    with torch.autocast("cpu", torch.bfloat16):
        wanted = model(tokens, target=target)
    prepared = accelerator.prepare(model)
    out = prepared(tokens, target=target)
    assert isinstance(out, LogprobEntropy) and torch.equal(out.logp, wanted.logp)
    assert isinstance(model(tokens, target=target, advantage=torch.randn(target.shape)), PolicyLoss)
    with pytest.raises(ValueError, match="is not patched, or its forward was wrapped since"):
        unpatch(model)
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert (unwrapped(tokens, target=target).logp - wanted.logp).abs().max() > 0
    assert type(unpatch(unwrapped).lm_head) is nn.Linear


def test_patching_again_after_the_head_was_resized():
    model, (tokens, target) = patch(patch(tiny())), batch()
    before = model(tokens, target=target).logp
    model.resize_token_embeddings(VOCAB + 8, mean_resizing=False)
    with pytest.raises(TypeError, match="lm_head of Qwen2ForCausalLM is now Linear.*patch the model again"):
        model(tokens, target=target)
    patch(model)
    check_patch(model, input_ids=tokens)
    assert not torch.equal(model(tokens, target=target).logp, before)
    unpatch(model)
    with pytest.raises(ValueError, match="not patched"):
        unpatch(model)
    head = FusedLMHead.from_linear(model.lm_head)
    model.lm_head = head
    assert type(unpatch(patch(model)).lm_head) is FusedLMHead and model.lm_head is head


def test_next_token_target():
    tokens = torch.tensor([[5, 6, 7, 8], [9, -100, 4, 3]])
    assert next_token_target(tokens).tolist() == [[6, 7, 8, -100], [-100, 4, 3, -100]]
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    assert next_token_target(tokens, mask).tolist() == [[-100, 7, 8, -100], [-100, 4, -100, -100]]
    with pytest.raises(ValueError, match="shapes must agree"):
        next_token_target(tokens, mask[:, 1:])


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_gradient_checkpointing(family):
    model, (tokens, target) = patch(tiny(family)).train(), batch()
    plain = gradients(model, model(tokens, target=target).logp.sum())
    model.gradient_checkpointing_enable()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = gradients(model, model(tokens, target=target).logp.sum())
    assert_same_gradients(again, plain, 1e-6)


def test_autocast():
    """Log-probs are no further from float64 than those of the stock model's bfloat16 logits."""
    model, (tokens, target) = tiny(), batch(8, 24)
    stock = copy.deepcopy(model)
    patch(model)
    truth, _ = expected(copy.deepcopy(stock).double(), target, input_ids=tokens)
    with torch.autocast("cpu", torch.bfloat16):
        out, (rounded, _) = model(tokens, target=target), expected(stock, target, input_ids=tokens)
    assert out.logp.dtype == torch.float32
    ours, theirs = ((value.double() - truth).norm() for value in (out.logp, rounded))
    assert 0 < ours <= 1.05 * theirs


def test_compiled_in_one_graph():
    model, (tokens, target) = patch(tiny("gemma2", num_hidden_layers=1)), batch()
    advantage, old_logp = torch.randn(target.shape), -torch.rand(target.shape)
    arguments = dict(target=target, advantage=advantage, old_logp=old_logp, temperature=0.8)
    eager = gradients(model, model(tokens, **arguments).loss)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens, target=target), model(tokens, target=target), rtol=1e-4, atol=1e-5)
    assert_same_gradients(gradients(model, compiled(tokens, **arguments).loss), eager)


@pytest.mark.parametrize("wrapped_first", [False, True])
@pytest.mark.parametrize("trained_head", [False, True])
def test_lora(wrapped_first, trained_head):
    """A patched model can become a PeftModel, and a PeftModel can be patched, unless it wraps the head."""
    model, (tokens, target) = tiny(), batch()
    stock = copy.deepcopy(model)
    options = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False,
        modules_to_save=["lm_head"] if trained_head else None, task_type="CAUSAL_LM",
    )  # fmt: skip
    if wrapped_first and trained_head:
        with pytest.raises(TypeError, match="got ModulesToSaveWrapper: patch the model first, and pass it to get_peft"):
            patch(get_peft_model(model, options))
        return
    model = patch(get_peft_model(model, options)) if wrapped_first else get_peft_model(patch(model), options)
    assert isinstance(model, PeftModel)
    stock = get_peft_model(stock, options)
    stock.load_state_dict(model.state_dict())
    out, (logp, _) = model(input_ids=tokens, target=target), expected(stock, target, input_ids=tokens)
    torch.testing.assert_close(out.logp.double(), logp, rtol=1e-5, atol=2e-5)
    got, want = gradients(model, out.logp.sum()), gradients(stock, logp.sum())
    assert any("lora" in name for name in got) and any("lm_head" in name for name in got) is trained_head
    assert_same_gradients(got, want)
    loss = model(input_ids=tokens, target=target, advantage=torch.randn(target.shape)).loss
    assert gradients(model, loss).keys() == want.keys()
    check_patch(model, input_ids=tokens)
    if not trained_head:
        unpatch(model)
        assert torch.equal(model(input_ids=tokens).logits, stock(input_ids=tokens).logits)
